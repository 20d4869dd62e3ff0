"""States and batches as safetensors: no pickle, so opening a stranger's run runs no code."""

import hashlib
import json
import re
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from backtrail.errors import BadBatch
from backtrail.step.state import State
from backtrail.task.task import Batch
from backtrail.tree import Tree, tree_flatten_with_path, tree_map


def pack_state(state: State) -> bytes:
    """A state as the bytes of a safetensors file."""
    named = {f"param:{name}": tensor for name, tensor in state.params.items()}
    named |= {f"buffer:{name}": tensor for name, tensor in state.buffers.items()}
    named |= {
        f"moment:{key}:{name}": m for name, tree in state.moments.items() for key, m in tree.items()
    }
    # A safetensors file is sorted by name; states come back in the model's order, which a sweep
    # relies on.
    return save(_apart(named), metadata={"order": json.dumps(list(named))})


def _apart(tensors: Tree) -> Tree:
    """Contiguous tensors, none on another's memory (a buffer may be a view of a parameter): safetensors wants it so."""
    found, taken = {}, set()
    for name, tensor in tensors.items():
        plain = tensor.detach().contiguous()
        address = plain.untyped_storage().data_ptr()
        found[name] = plain.clone() if address in taken else plain
        taken.add(address)
    return found


def unpack_state(content: bytes) -> State:
    """The state that `pack_state` wrote."""
    state, tensors = State({}, {}, {}), load(content)
    for label in _order(content):
        kind, _, name = label.partition(":")
        match kind:
            case "param":
                state.params[name] = tensors[label]
            case "buffer":
                state.buffers[name] = tensors[label]
            case _:
                key, _, name = name.partition(":")
                state.moments.setdefault(name, {})[key] = tensors[label]
    return state


def _order(content: bytes) -> list[str]:
    """The names in the order in which they were packed; the head of a safetensors file is JSON after its length."""
    head = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    order: list[str] = json.loads(head["__metadata__"]["order"])
    return order


def pack_batches(batches: tuple[Batch, ...]) -> bytes:
    """The batches of one step, nested tuples, lists and dicts of tensors and plain values, as safetensors bytes.

    Raises:
        BadBatch: a batch holds something else.
    """
    tensors: Tree = {}

    def describe(value: Any) -> Any:
        match value:
            case Tensor():
                tensors[str(len(tensors))] = value.detach().contiguous()
                return {"tensor": len(tensors) - 1}
            case dict():
                return {"dict": [[describe(key), describe(item)] for key, item in value.items()]}
            case tuple() | list() if type(value) in {tuple, list}:
                return {type(value).__name__: [describe(item) for item in value]}
            case None | bool() | int() | float() | str():
                return {"plain": value}
        raise BadBatch(type(value).__name__)

    structure = json.dumps([describe(batch) for batch in batches])
    return save(
        tensors | {"structure": torch.frombuffer(bytearray(structure.encode()), dtype=torch.uint8)}
    )


def unpack_batches(content: bytes) -> tuple[Batch, ...]:
    """The batches that `pack_batches` wrote."""
    tensors = load(content)
    structure = bytes(tensors["structure"].numpy())

    def build(described: dict[str, Any]) -> Any:
        ((kind, value),) = described.items()
        match kind:
            case "tensor":
                return tensors[str(value)]
            case "dict":
                return {build(key): build(item) for key, item in value}
            case "plain":
                return value
        return (tuple if kind == "tuple" else list)(build(item) for item in value)

    return tuple(build(described) for described in json.loads(structure))


_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # in the repr of objects that have none of their own


def digest(batch: Batch) -> str:
    """Content hash of a batch: its structure, and dtype, shape and bytes of every tensor.

    >>> digest((torch.zeros(2), 1)) == digest((torch.zeros(2), 1))
    True
    """
    found = hashlib.sha256()
    for path, leaf in tree_flatten_with_path(batch)[0]:
        found.update(str(path).encode())
        if isinstance(leaf, Tensor):
            found.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            found.update(_bytes(leaf))
        else:
            found.update(_ADDRESS.sub("", repr(leaf)).encode())
    return found.hexdigest()[:16]


def _bytes(tensor: Tensor) -> bytes | memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""


def copied(batch: Batch) -> Batch:
    """A batch that later changes in place cannot reach."""
    return tree_map(
        lambda leaf: leaf.detach().cpu().clone() if isinstance(leaf, Tensor) else leaf, batch
    )
