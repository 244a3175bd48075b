"""Divergence and loss of a pass, against multi-head attention on the same tokens."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from chai.patching.apply import Decoder, ForwardPass, patched, running

#: Ends of the ranges of positions whose divergence is saved on its own.
POSITIONS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
#: Positions whose logits are reduced at a time.
BLOCK = 256


@torch.inference_mode()
def logits_of(model: PreTrainedModel, forward_pass: ForwardPass, ids: Tensor, first: int = 0) -> Tensor:
    """Return the logits ``[B, T - first, V]`` of tokens ``[B, T]`` from position ``first`` on, under a pass.

    Raises:
        ValueError: A method is applied to the model already.
    """

    def decode(decoder: Decoder, *args: Any, **kwargs: Any) -> Any:
        with running(forward_pass):
            return decoder.forward(*args, **kwargs)

    wanted = ids.shape[1] - first
    fewer = "logits_to_keep" in inspect.signature(model.forward).parameters
    with patched(model, decode):
        logits: Tensor = model(ids, use_cache=False, **({"logits_to_keep": wanted} if fewer else {})).logits
    return logits[:, -wanted:]


class Reference:
    """The next-token distributions of multi-head attention, with which those of other passes are compared."""

    def __init__(self, logits: Tensor, targets: Tensor) -> None:
        """Take logits ``[B, N, V]`` and the tokens that follow, ``[B, N]``."""
        self._targets = targets.to(logits.device)
        log_probabilities = logits.float().log_softmax(-1)
        self.losses = -log_probabilities.gather(2, self._targets[..., None])[..., 0]
        self._probabilities = log_probabilities.exp()
        self._negative_entropy = torch.stack(
            [torch.linalg.vecdot(p, log_p) for p, log_p in zip(self._probabilities, log_probabilities, strict=True)]
        )

    @torch.inference_mode()
    def compare(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return, in nats, ``KL(p || q)`` and the change of the loss of each position, ``[B, N]`` each.

        With logits z of q, ``KL(p || q) = sum_v p(v) log p(v) - sum_v p(v) z(v) + log sum_v exp z(v)``.
        """
        kl, losses = [], []
        for begin in range(0, logits.shape[1], BLOCK):
            part = slice(begin, begin + BLOCK)
            scores = logits[:, part].float()
            scores = scores - scores.amax(-1, keepdim=True)
            total = scores.logsumexp(-1)
            expected = torch.linalg.vecdot(self._probabilities[:, part], scores)
            kl.append(self._negative_entropy[:, part] - expected + total)
            losses.append(total - scores.gather(2, self._targets[:, part, None])[..., 0])
        return torch.cat(kl, 1).cpu(), (torch.cat(losses, 1) - self.losses).cpu()


def by_position(values: Tensor, first: int) -> dict[str, Tensor]:
    """Average values ``[B, N]`` of the positions from ``first`` on in each range, by names such as ``kl 256-512``."""
    ranges, begin, tokens = {}, first, first + values.shape[1] + 1
    for end in (end for end in POSITIONS if end > first):
        stop = min(end, tokens)
        if begin < tokens - 1:
            ranges[f"kl {begin}-{stop}"] = values[:, begin - first : stop - first].mean(1)
        begin = stop
    return ranges
