"""Training checkpoints of a gradient-based detector: one safetensors file beside the artifact, replaced each time.

Checkpoints belong to one fit of one set of images: after a worker, node or driver was killed, the fit resumes from the
last one, and other fits do not find them. They are deleted when the artifact is committed.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from raydetect.errors import StorageError
from raydetect.storage import Storage, join_uri

NAME = re.compile(r"/epoch-(\d{6})\.safetensors$")
MODULE, OPTIMIZER, FIELDS = "module.", "optimizer.", "words"


@dataclass(frozen=True, slots=True)
class TrainingState:
    """One checkpoint.

    Attributes:
        uri: of its file.
        tensors: of module and optimizer, by prefixed name.
        groups: the optimizer's parameter groups.
        plain: the entries of the optimizer's state that are not tensors.
        losses: mean loss of each completed epoch.
    """

    uri: str
    tensors: Mapping[str, Tensor]
    groups: list[dict[str, Any]]
    plain: Mapping[str, Mapping[str, Any]]
    losses: list[float]

    def restore(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Loads the checkpoint into the module and the optimizer.

        Raises:
            StorageError: it belongs to other networks.
        """
        try:
            self._restore(module, optimizer)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise _foreign(self.uri, error) from None

    def _restore(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        module.load_state_dict({n.removeprefix(MODULE): v for n, v in self.tensors.items() if n.startswith(MODULE)})
        states: dict[int, dict[str, Any]] = {int(number): dict(entries) for number, entries in self.plain.items()}
        for name, value in self.tensors.items():
            if name.startswith(OPTIMIZER):
                number, _, entry = name.removeprefix(OPTIMIZER).partition(".")
                states.setdefault(int(number), {})[entry] = value
        optimizer.load_state_dict({"state": states, "param_groups": self.groups})


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The checkpoints of one fit.

    Attributes:
        uri: their folder.
        storage: gives access to it.
        every: interval in epochs.
    """

    uri: str
    storage: Storage
    every: int

    def save(self, module: nn.Module, optimizer: torch.optim.Optimizer, losses: list[float]) -> None:
        """Writes the checkpoint after `len(losses)` epochs, then deletes earlier ones."""
        state = optimizer.state_dict()
        tensors = {MODULE + name: value for name, value in module.state_dict().items()}
        plain: dict[str, dict[str, Any]] = {}
        for number, entries in state["state"].items():
            for name, value in entries.items():
                if isinstance(value, Tensor):
                    tensors[f"{OPTIMIZER}{number}.{name}"] = value
                else:
                    plain.setdefault(str(number), {})[name] = value
        fields = {"groups": state["param_groups"], "plain": plain, "losses": losses}
        tensors[FIELDS] = torch.frombuffer(bytearray(json.dumps(fields).encode()), dtype=torch.uint8)
        data = save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
        earlier = self._found()
        self.storage.write(join_uri(self.uri, f"epoch-{len(losses):06d}.safetensors"), data)
        self._delete({epoch: uri for epoch, uri in earlier.items() if epoch != len(losses)})

    def last(self) -> "TrainingState | None":
        """The last checkpoint, None if there is none.

        Raises:
            StorageError: it is damaged.
        """
        found = self._found()
        if not found:
            return None
        uri = found[max(found)]
        try:
            tensors = load(self.storage.read(uri))
            fields = json.loads(tensors.pop(FIELDS).numpy().tobytes())
            losses = [float(loss) for loss in fields["losses"]]
            return TrainingState(uri, tensors, fields["groups"], fields["plain"], losses)
        except (KeyError, ValueError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
            raise _foreign(uri, error) from None

    def clear(self) -> None:
        """Deletes all checkpoints."""
        self._delete(self._found())

    def _delete(self, found: Mapping[int, str]) -> None:
        for uri in found.values():
            self.storage.delete(uri)

    def _found(self) -> dict[int, str]:
        if not self.storage.exists(self.uri):
            return {}
        names = {file.uri: NAME.search(file.uri) for file in self.storage.list(self.uri)}
        return {int(name.group(1)): uri for uri, name in names.items() if name}


def _foreign(uri: str, error: Exception) -> StorageError:
    reason = " ".join(str(error).split())[:160]
    return StorageError(f"{uri}: is not a checkpoint of this fit ({reason}). Remove it to train from the start.")
