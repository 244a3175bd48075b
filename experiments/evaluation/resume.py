"""Open the saved responses of a run."""

from __future__ import annotations

from transformers import PreTrainedModel

from chai.patching.devices import input_device
from experiments.evaluation.responses import FILE, SavedResponses, code_digest, response_file, worker_files
from experiments.runs.code import versions
from experiments.runs.folder import RunFolder
from experiments.runs.model import model_source
from experiments.system.device import device_name
from experiments.system.distributed import ProcessGroup


def open_responses(folder: RunFolder, model: PreTrainedModel, group: ProcessGroup) -> SavedResponses:
    """Open this process's response file; responses saved by the others in an earlier attempt are restored too."""
    about = {
        "run_id": folder.id,
        "device": device_name(input_device(model)),
        "device_map": model_source(folder.config).device_map,
        "dtype": str(model.dtype),
        "revision": getattr(model.config, "_commit_hash", None),  # of weights from the hub
        "versions": versions() | {"code": None},  # the digest below: a commit may leave the code as it is
        "code": code_digest(),
    }
    name = response_file(group.rank)
    others = [other for other in (FILE, *worker_files(folder.path, group.world_size)) if other != name]
    folder.path.mkdir(parents=True, exist_ok=True)  # rank 0 may have made it on another machine only
    return SavedResponses(folder.path / name, about, [folder.path / other for other in others])
