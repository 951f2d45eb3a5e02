"""Compiled programs of XLA, read from their text: operations, the bytes that they move, and their collectives.

Only what a device executes counts: the entry computation, the bodies of its loops as often as they run, of a condition
the branch that moves less, and what is called. A fusion is one operation; inside it nothing reaches the memory.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
# They name, order or allocate what other operations read and write.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "partition-id"),
    *("replica-id", "ConcatBitcast", "AllocateBuffer"),
}
_CALLED = re.compile(
    r"(?:body|to_apply|calls|branch_computations|true_computation|false_computation)=(\{[^}]*\}|%[\w.-]+)"
)
_NAME = re.compile(r"%([\w.-]+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array that an operation gives: its type, such as 'bf16', its axes, and whether it lies in the device's memory.

    What is not there lies in a memory of the core's own, such as a TPU's VMEM.
    """

    dtype: str
    shape: tuple[int, ...]
    outside: bool

    @property
    def size(self) -> int:
        """Bytes, without the padding of a layout in tiles."""
        bits = re.search(r"\d+", self.dtype)
        return math.prod(self.shape) * (int(bits[0]) if bits else 8) // 8  # 'pred' has a byte


@dataclasses.dataclass(frozen=True)
class Operation:
    """A line of a computation.

    Attributes:
      name: unique in the program.
      kind: such as 'fusion' or 'all-gather'; of a custom call its target.
      results: the arrays that it gives, those of nested tuples in order.
      operands: names of the operations whose results it takes.
      attributes: the rest of the line.
    """

    name: str
    kind: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str

    def attribute(self, pattern: str) -> str:
        """What the group of a pattern finds in the attributes, or ''."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else ""

    @property
    def path(self) -> str:
        """Where in the code it stems from, such as 'jit(step)/jvp(AlexNet)/conv1/add', or ''."""
        return self.attribute(r'op_name="([^"]*)"')

    @property
    def cycles(self) -> int:
        """The cycles that the compiler for TPUs expects it to take; 0 if it says nothing."""
        return int(self.attribute(r'"estimated_cycles":"(\d+)"') or 0)

    @property
    def called(self) -> list[str]:
        """The computations that it runs: the body of a loop, all branches of a condition, the inside of a fusion."""
        return [name for part in _CALLED.findall(self.attributes) for name in _NAME.findall(part)]


@dataclasses.dataclass(frozen=True)
class Collective:
    """An exchange between devices.

    Attributes:
      kind: one of COLLECTIVES.
      shapes: of its largest arrays, such as 'bf16[128,13,13,256]': the gathered ones, or those to be reduced.
      size: their bytes.
      groups: the numbers of the devices that exchange with one another.
      path: see `Operation`.
      position: how many of the program's operations begin before it.
      done: how many begin before it must be complete.
      times: how often it runs.
    """

    kind: str
    shapes: tuple[str, ...]
    size: int
    groups: tuple[tuple[int, ...], ...]
    path: str
    position: int
    done: int
    times: int

    @property
    def sent(self) -> float:
        """Bytes that each device sends, if the devices of a group form a ring."""
        among = max(map(len, self.groups))
        share = {"all-reduce": 2 * (among - 1) / among, "collective-permute": 1.0}
        return self.times * self.size * share.get(self.kind, (among - 1) / among)


class Program:
    """A compiled program, from what `Compiled.as_text` returns."""

    def __init__(self, text: str):
        self.computations, operations = {}, []
        for line in text.splitlines():
            if found := re.match(r"(ENTRY )?%([\w.-]+) \(.*\{$", line):
                operations = self.computations[found[2]] = []
                if found[1]:
                    self._entry = found[2]
            elif operation := _operation(line):
                operations.append(operation)
        self._by_name = {each.name: each for some in self.computations.values() for each in some}

    def executed(self) -> Iterator[tuple[Operation, int]]:
        """Yields what a device executes, in order, and how often."""
        yield from self._run(self._entry, 1)

    def _run(self, computation, times):
        for operation in self.computations[computation]:
            if operation.kind == "while":
                yield from self._run(operation.attribute(r"body=%([\w.-]+)"), times * self._trips(operation))
            elif operation.kind == "conditional":
                yield from self._run(min(operation.called, key=self._traffic), times)
            elif operation.kind == "call":
                yield from self._run(operation.called[0], times)
            elif operation.kind not in _FREE:
                yield operation, times

    def _trips(self, loop):
        known = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"')
        if known:
            return int(known)
        condition = self.computations[loop.attribute(r"condition=%([\w.-]+)")]
        return max(int(each.attribute(r"^constant (\d+)") or 1) for each in condition)

    def _traffic(self, computation):
        return sum(times * self.moved(operation) for operation, times in self._run(computation, 1))

    def operands(self, operation: Operation) -> list[Array]:
        """The arrays that an operation takes."""
        return [array for name in operation.operands for array in self._by_name[name].results]

    def given(self, operation: Operation) -> list[Array]:
        """The arrays that an operation gives; the result of one that only begins names operands and semaphores too."""
        if not operation.kind.endswith("-start"):
            return list(operation.results)
        arrays = [array for array in operation.results if array.shape]
        if operation.kind == "copy-start":
            return arrays[:1]
        return arrays if operation.kind == "all-reduce-start" else arrays[len(self.operands(operation)) :]

    def moved(self, operation: Operation) -> int:
        """Bytes that it reads from the device's memory and writes there.

        A slice inside of a fusion is charged its whole operand.
        """
        if operation.kind.endswith(("-done", "-update")):
            return 0
        taken, given = self.operands(operation), self.given(operation)
        if operation.kind in ("slice", "slice-start", "dynamic-slice"):
            taken = [dataclasses.replace(given[0], outside=taken[0].outside)]
        if operation.kind == "dynamic-update-slice":
            taken = given = taken[1:2]
        return sum(array.size for array in (*taken, *given) if array.outside)

    def inside(self, operation: Operation) -> Iterator[Operation]:
        """Yields the operations of a fusion, the last first, and those of fusions in it."""
        for name in operation.called if operation.kind == "fusion" else ():
            for each in reversed(self.computations[name]):
                yield each
                yield from self.inside(each)

    def paths(self, operation: Operation) -> Iterator[str]:
        """Yields the paths that tell where an operation stems from, the best first.

        They are those of a fusion's products, of what gives its largest result, its own, those of all inside of it, and
        those of what it takes.
        """
        while True:
            inner = list(self.inside(operation))
            yield from (each.path for each in inner if each.kind in ("convolution", "dot"))
            if inner and inner[0].kind == "tuple":
                given = [self._by_name[name] for name in inner[0].operands]
                yield max(given, key=lambda each: sum(array.size for array in each.results)).path
            yield operation.path
            yield from (each.path for each in inner)
            if not operation.operands:
                return
            operation = self._by_name[operation.operands[0]]

    def collectives(self) -> list[Collective]:
        """The exchanges between devices, in the order in which they begin."""
        begun, done = {}, {}
        for position, (operation, times) in enumerate(self.executed()):
            for each in (operation, *self.inside(operation)):
                if each.kind.removesuffix("-done") in COLLECTIVES and each.kind.endswith("-done"):
                    done[each.operands[0]] = position
                elif each.kind.removesuffix("-start") in COLLECTIVES:
                    # A TPU hides an exchange behind several fusions, which all name it.
                    key = each.attribute(r'chain_id="(\d+)"') or each.name
                    begun.setdefault(key, (each, operation, position, times))
                    done[key] = position + 1
        return [self._collective(*values, done[key]) for key, values in begun.items()]

    def _collective(self, operation, outer, position, times, done):
        kind = operation.kind.removesuffix("-start")
        arrays = max(self.operands(operation), self.given(operation), key=lambda some: sum(each.size for each in some))
        return Collective(
            kind=kind,
            shapes=tuple(f"{array.dtype}[{','.join(map(str, array.shape))}]" for array in arrays),
            size=sum(array.size for array in arrays),
            groups=_groups(operation),
            path=next(filter(None, (*self.paths(operation), *self.paths(outer))), ""),
            position=position,
            done=done,
            times=times,
        )


def _groups(operation) -> tuple[tuple[int, ...], ...]:
    """The groups of devices of a collective, listed, or as a reshaped and transposed range: [4,2]<=[2,4]T(1,0)."""
    if listed := operation.attribute(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}"):
        return tuple(tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", listed))
    shape, axes, order = (
        [int(n) for n in operation.attribute(pattern).split(",") if n]
        for pattern in (r"replica_groups=\[([\d,]+)\]<=", r"<=\[([\d,]+)\]", r"<=\[[\d,]+\]T\(([\d,]+)\)")
    )
    numbers = np.arange(math.prod(axes)).reshape(axes).transpose(order or None).reshape(shape)
    return tuple(map(tuple, numbers.tolist()))


def _operation(line: str) -> Operation | None:
    head = re.match(r"\s*(?:ROOT )?%([\w.-]+) = ", line)
    if not head:
        return None
    rest = line[head.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    results, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    kind, closing = rest[:opening], _closing(rest, opening)
    inner, attributes = rest[opening + 1 : closing], rest[closing + 1 :]
    if kind == "custom-call":
        kind = re.search(r'custom_call_target="([^"]*)"', attributes)[1]
    if kind == "constant":
        attributes = f"constant {inner}{attributes}"
    arrays = tuple(
        Array(dtype, tuple(int(n) for n in shape.split(",") if n), not re.search(r"S\([1-46-9]", layout))
        for dtype, shape, layout in re.findall(r"([a-z]+\d*[a-z\d]*)\[([\d,]*)\](\{[^}]*\}|)", results)
    )
    return Operation(head[1], kind, arrays, tuple(_NAME.findall(inner)), attributes)


def _closing(text: str, opening: int) -> int:
    """Where the bracket that opens at `opening` closes."""
    depth = 0
    for place in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if not depth:
            return place
    raise ValueError(f"no bracket closes in {text[:80]}")
