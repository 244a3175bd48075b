"""Code that figures share: :mod:`.style` and :mod:`.page` all of them, every other module a family of figures."""
