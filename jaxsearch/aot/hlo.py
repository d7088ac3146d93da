"""What one device does in a compiled TPU program, read from its HLO text: matmuls, traffic to memory, collectives.

XLA's own cost analysis counts the body of a loop once. Here each body counts as often as it runs.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4,
          "s64": 8, "u64": 8, "f64": 8, "s4": 0.5, "u4": 0.5, "c64": 8, "f8e4m3fn": 1, "f8e5m2": 1}  # fmt: skip
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_NO_TRAFFIC = frozenset([
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all", "partition-id",
    "replica-id", "iota", "opt-barrier", "add-dependency",
])  # fmt: skip


@dataclass(frozen=True)
class Collective:
    """All runs of one kind of collective in a program."""

    count: float = 0.0
    """How often it runs."""
    bytes: float = 0.0
    """Bytes that one device receives, on the way that moves the fewest: (n - 1) / n of the gathered array, twice that for an all-reduce."""


@dataclass(frozen=True)
class Work:
    """What one device does in one run of a program."""

    flops: float
    """Of matmuls."""
    bytes: float
    """Read from and written to HBM by each operation; what stays on the chip is left out."""
    collectives: dict[str, Collective]


@dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    literal: str
    root: bool


@dataclass
class _Computation:
    name: str
    instructions: dict[str, _Instruction] = field(default_factory=dict)

    def type(self, name: str) -> str:
        found = self.instructions.get(name)
        return found.type if found else ""


def _balanced(text: str) -> int:
    """Where the parenthesis that opens `text` is closed."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return place
    raise ValueError(f"a parenthesis is not closed: {text[:80]}")


def _instruction(line: str) -> _Instruction | None:
    head, separator, rest = line.strip().partition(" = ")
    if not separator or "%" not in head:
        return None
    rest = re.sub(r"/\*.*?\*/", "", rest)
    end = _balanced(rest) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].strip()
    opcode, _, arguments = rest.partition("(")
    end = _balanced("(" + arguments) - 1
    inside, attributes = arguments[:end], arguments[end + 1 :]
    name = _NAME.search(head)
    assert name is not None
    operands = tuple(_NAME.findall(inside))
    return _Instruction(name[1], kind, opcode, operands, attributes, inside, head.startswith("ROOT"))


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    current, entry = None, ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" ") and "->" in line:
            name = _NAME.search(line)
            if name:
                current = computations[name[1]] = _Computation(name[1])
                entry = name[1] if line.startswith("ENTRY") else entry
        elif line == "}":
            # More may stand behind it where a kernel's metadata, which have lines of their own, end.
            current = None
        elif current is not None and (found := _instruction(line)) is not None:
            current.instructions[found.name] = found
    if not entry:
        raise ValueError("the text has no ENTRY computation: give the HLO of a compiled program")
    return computations, entry


def _arrays(type_: str) -> Iterator[tuple[list[int], float, bool]]:
    """Sizes, bytes and whether it lies in HBM, of each array of a type."""
    for dtype, sizes, layout in _ARRAY.findall(type_):
        if dtype in _BYTES:
            shape = [int(size) for size in sizes.split(",") if size]
            # S(n) names another memory space: VMEM, SMEM, the host.
            yield shape, math.prod(shape) * _BYTES[dtype], "S(" not in layout


def _size(type_: str, hbm: bool = False) -> float:
    return sum(size for _, size, inside in _arrays(type_) if inside or not hbm)


def _shape(type_: str) -> list[int]:
    return next((shape for shape, _, _ in _arrays(type_)), [])


def _attribute(instruction: _Instruction, name: str) -> list[str]:
    found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^,\s]+)", instruction.attributes)
    return _NAME.findall(found[1]) if found else []


def _trips(instruction: _Instruction, computations: dict[str, _Computation]) -> int:
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', instruction.attributes)
    if known:
        return int(known[1])
    # A scan counts from 0 up to the constant that its condition compares with; so do the loops (over u32) in which the compiler
    # multiplies one part of a gathered matrix while the next one is on its way.
    numbers: list[int] = []
    waiting = _attribute(instruction, "condition")
    while waiting:
        for part in computations[waiting.pop()].instructions.values():
            waiting += _attribute(part, "calls")
            if part.opcode == "constant" and part.type.startswith(("s32[]", "u32[]")):
                numbers.append(int(part.literal))
    return math.ceil(max(numbers, default=1) / _step(instruction, computations))


def _step(loop: _Instruction, computations: dict[str, _Computation]) -> int:
    """What a loop's counter grows by in one run of its body."""
    (condition,), (body,) = (_attribute(loop, name) for name in ("condition", "body"))
    inside, outside = computations[body].instructions, computations[condition].instructions
    roots = [part for part in outside.values() if part.root and part.opcode == "compare"]
    counter = outside.get(roots[0].operands[0]) if roots else None
    place = re.search(r"index=(\d+)", counter.attributes) if counter else None
    if place is None:
        return 1
    result = next(part for part in inside.values() if part.root)
    grown = inside.get(result.operands[int(place[1])])
    if grown is None or grown.opcode != "add":
        return 1
    steps = [inside[name].literal for name in grown.operands if inside[name].opcode == "constant"]
    return max(1, int(steps[0])) if steps else 1


def _group_size(instruction: _Instruction) -> int:
    text = instruction.attributes
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", text):
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        total = 1
        for axis in re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found[2]):
            total *= int(axis[1]) if axis[1] else sizes[axis[0]]
        return total
    return 0


def _received(kind: str, instruction: _Instruction, computation: _Computation, devices: int) -> float:
    """Bytes that one device receives in one run."""
    given = sum(_size(computation.type(name)) for name in instruction.operands)
    if kind == "collective-permute":
        return given
    n = _group_size(instruction) or devices
    share = (n - 1) / n
    return share * given * {"all-gather": n, "all-reduce": 2}.get(kind, 1)


def _convolution(instruction: _Instruction, computation: _Computation) -> float:
    """FLOPs; TPU compilers write matmuls as convolutions, their batch axes as dilated windows that meet one place each."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels is not None
    lhs, rhs = (_shape(computation.type(name)) for name in instruction.operands[:2])
    out = _shape(instruction.type)
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    options = dict(part.split("=") for part in window[1].split()) if window else {}
    total = 2.0 * out[labels[3].index("b")] * out[labels[3].index("f")] * rhs[labels[2].index("i")]
    for axis in range(len(labels[1]) - 2):
        total *= _meetings(
            lhs[labels[1].index(str(axis))],
            rhs[labels[2].index(str(axis))],
            out[labels[3].index(str(axis))],
            {name: value.split("x")[axis] for name, value in options.items()},
        )
    return total


def _meetings(size: int, kernel: int, out: int, options: dict[str, str]) -> int:
    """How many pairs of a place in the output and a place in the window lie on a number of the input, along one axis."""
    stride, dilate = int(options.get("stride", 1)), int(options.get("lhs_dilate", 1))
    spread, low = int(options.get("rhs_dilate", 1)), int(options.get("pad", "0_0").split("_")[0])
    end = (size - 1) * dilate
    count = 0
    for place in range(kernel):
        offset = place * spread - low
        # Places o of the output with 0 <= o * stride + offset <= end, on a multiple of the dilation.
        first = max(0, -(offset // stride)) if offset < 0 else 0
        last = min(out - 1, (end - offset) // stride)
        if dilate == 1:
            count += max(0, last - first + 1)
        else:
            count += sum((o * stride + offset) % dilate == 0 for o in range(first, last + 1))
    return count


def _dot(instruction: _Instruction, computation: _Computation) -> float:
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    lhs = _shape(computation.type(instruction.operands[0]))
    axes = [int(axis) for axis in found[1].split(",") if axis] if found else []
    return 2.0 * math.prod(_shape(instruction.type)) * math.prod(lhs[axis] for axis in axes)


class _Reader:
    def __init__(self, text: str) -> None:
        self.computations, self.entry = _parse(text)
        counts = [int(n) for n in re.findall(r"(?:num_partitions|replica_count)=(\d+)", text[:4000])]
        self.devices = math.prod(counts) if counts else 1
        self.flops = self.bytes = 0.0
        self.counts: dict[str, float] = defaultdict(float)
        self.received: dict[str, float] = defaultdict(float)

    def walk(self, name: str, times: float, fused: bool = False) -> None:
        computation = self.computations[name]
        for part in computation.instructions.values():
            if part.opcode == "while":
                runs = times * _trips(part, self.computations)
                for body in _attribute(part, "body"):
                    self.walk(body, runs)
                continue
            if part.opcode == "convolution":
                self.flops += times * _convolution(part, computation)
            elif part.opcode == "dot":
                self.flops += times * _dot(part, computation)
            kind = part.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                # A TPU's reduce-scatter is written as an all-reduce of which a slice is kept.
                if kind == "all-reduce" and "scatter" in name:
                    kind = "reduce-scatter"
                self.counts[kind] += times
                self.received[kind] += times * _received(kind, part, computation, self.devices)
            if not fused:
                self.bytes += times * self._traffic(part, computation)
            inner = fused or part.opcode == "fusion"
            for called in (*_attribute(part, "calls"), *_attribute(part, "branch_computations")):
                self.walk(called, times, inner)
            if part.opcode == "call":
                for called in _attribute(part, "to_apply"):
                    self.walk(called, times, fused)

    def _traffic(self, part: _Instruction, computation: _Computation) -> float:
        if part.opcode in _NO_TRAFFIC or part.opcode.endswith("-done"):
            return 0.0
        if part.opcode.endswith("-start"):
            # Its type repeats the operands: source and target are what moves.
            arrays = list(_arrays(part.type))[: len(part.operands) + 1]
            return sum(size for _, size, inside in arrays if inside)
        sizes = [_size(computation.type(name), hbm=True) for name in part.operands]
        out = _size(part.type, hbm=True)
        if part.opcode == "dynamic-slice":
            return out + min(out or math.inf, sizes[0])
        if part.opcode == "dynamic-update-slice":
            return 2 * sizes[1]
        if part.opcode != "fusion":
            return out + sum(sizes)
        body = self.computations[_attribute(part, "calls")[0]]
        return self._fused(body, sizes, out)

    def _fused(self, body: _Computation, sizes: list[float], out: float) -> float:
        """Operands of which a fusion reads one slice, and outputs of which it writes one, count as that slice."""
        users: dict[str, list[_Instruction]] = defaultdict(list)
        for part in body.instructions.values():
            for name in part.operands:
                users[name].append(part)
        total = 0.0
        for part in body.instructions.values():
            if part.opcode == "parameter" and part.literal.isdigit() and int(part.literal) < len(sizes):
                size, readers = sizes[int(part.literal)], users[part.name]
                if readers and all(r.opcode == "dynamic-slice" for r in readers):
                    size = min(size, sum(_size(r.type) for r in readers))
                elif readers and all(
                    r.opcode == "dynamic-update-slice" and r.operands[0] == part.name for r in readers
                ):
                    out = min(out, sum(_size(body.type(r.operands[1])) for r in readers))
                    size = 0.0
                total += size
        return total + out


def read_work(text: str) -> Work:
    """Return what one device does in one run of a program.

    Args:
        text: HLO of the compiled program (`compiled.as_text()`).
    """
    reader = _Reader(text)
    reader.walk(reader.entry, 1.0)
    collectives = {kind: Collective(reader.counts[kind], reader.received[kind]) for kind in reader.counts}
    return Work(reader.flops, reader.bytes, collectives)
