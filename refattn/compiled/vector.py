"""Numbers side by side in one register, for Numba: what a loop over positions needs to be as fast as a matrix product.

    x = load(p, i)          a vector of 64 bytes, 16 float32 or 8 float64, from where p + i points to; store(p, i, x) puts it there
    fma(a, x, y)            a x + y, rounded once; a is a number or a vector

LLVM makes of them whatever the processor has: one AVX-512 register, two of AVX, four of NEON.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .._array import missing_extra

try:
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.core.imputils import impl_ret_borrowed
    from numba.extending import intrinsic, models, register_model
except ImportError:
    raise missing_extra("numba", "numba") from None

BYTES = 64


class Vector(types.Type):
    """BYTES of one kind of number."""

    def __init__(self, scalar: Any) -> None:
        super().__init__(f"Vector({scalar})")
        self.scalar = scalar


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, ir.VectorType(manager.lookup(kind.scalar).get_value_type(), BYTES * 8 // kind.scalar.bitwidth))


def _address(builder: Any, pointer: Any, i: Any, kind: Any) -> Any:
    return builder.bitcast(builder.gep(pointer, [i]), kind.as_pointer())


@intrinsic
def row(typing: Any, a: Any, i: Any) -> Any:
    """Where a[i] begins, a of two axes whose last one is contiguous."""
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        step = builder.extract_value(array.strides, 0)
        whole = builder.ptrtoint(array.data, step.type)
        return builder.inttoptr(builder.add(whole, builder.mul(args[1], step)), array.data.type)

    return types.CPointer(a.dtype)(a, types.intp), code


@intrinsic
def boundary(typing: Any, a: Any) -> Any:
    """The first whole BYTES behind the beginning of a (n,), where a vector stands in one line of the cache: at most BYTES - 1 bytes on."""
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        whole = ir.IntType(types.intp.bitwidth)
        at = builder.add(builder.ptrtoint(array.data, whole), ir.Constant(whole, BYTES - 1))
        return builder.inttoptr(builder.and_(at, ir.Constant(whole, -BYTES)), array.data.type)

    return types.CPointer(a.dtype)(a), code


@intrinsic
def alive(typing: Any, a: Any) -> Any:
    """Nothing. Numba gives an array back behind its last use, and does not know of pointers into it: this is a use."""
    return types.none(a), lambda context, builder, signature, args: context.get_dummy_value()


@intrinsic
def fixed(typing: Any, x: Any) -> Any:
    """An array as one that is not written to: the loops that read it are then those of the inputs, not variants of their own."""
    kind = types.Array(x.dtype, x.ndim, "A", readonly=True)
    return kind(x), lambda context, builder, signature, args: impl_ret_borrowed(context, builder, kind, args[0])


@intrinsic
def plus(typing: Any, p: Any, i: Any) -> Any:
    """Where p + i points to."""
    return p(p, types.intp), lambda context, builder, signature, args: builder.gep(args[0], [args[1]])


@intrinsic
def fetch(typing: Any, p: Any, i: Any) -> Any:
    """Ask for what p + i points to, to be in the second-level cache when it is needed."""
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte, whole = ir.IntType(8).as_pointer(), ir.IntType(32)
        f = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), [byte, whole, whole, whole]), "llvm.prefetch.p0i8")
        builder.call(f, [builder.bitcast(builder.gep(*args[:1], [args[1]]), byte), *(ir.Constant(whole, x) for x in (0, 2, 1))])
        return context.get_dummy_value()

    return types.none(p, types.intp), code


@intrinsic
def load(typing: Any, p: Any, i: Any) -> Any:
    kind = Vector(p.dtype)

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_address(builder, args[0], args[1], context.get_value_type(kind)), align=p.dtype.bitwidth // 8)

    return kind(p, types.intp), code


@intrinsic
def store(typing: Any, p: Any, i: Any, x: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], _address(builder, args[0], args[1], args[2].type), align=p.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.none(p, types.intp, x), code


def _spread(builder: Any, x: Any, kind: Any) -> Any:
    """x in every place of a vector."""
    if isinstance(x.type, ir.VectorType):
        return x
    nothing, whole = ir.Constant(kind, ir.Undefined), ir.IntType(32)
    one = builder.insert_element(nothing, x, ir.Constant(whole, 0))
    return builder.shuffle_vector(one, nothing, ir.Constant(ir.VectorType(whole, kind.count), [0] * kind.count))


def _everywhere(kind: Any) -> Callable[[Any], Any]:
    """Of a value, the constant vector that has it in every place."""
    return lambda value: ir.Constant(kind, [ir.Constant(kind.element, value)] * kind.count)


def _scalar(a: Any, x: Any) -> Any:
    return a if isinstance(a, Vector) else x.scalar


@intrinsic
def fma(typing: Any, a: Any, x: Any, y: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = args[2].type
        f = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind] * 3), f"llvm.fma.v{kind.count}f{x.scalar.bitwidth}")
        return builder.call(f, [_spread(builder, args[0], kind), args[1], args[2]])

    return x(_scalar(a, x), x, x), code


@intrinsic
def mul(typing: Any, a: Any, x: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fmul(_spread(builder, args[0], args[1].type), args[1])

    return x(_scalar(a, x), x), code


@intrinsic
def add(typing: Any, a: Any, x: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fadd(_spread(builder, args[0], args[1].type), args[1])

    return x(_scalar(a, x), x), code


@intrinsic
def div(typing: Any, x: Any, y: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fdiv(args[0], args[1])

    return x(x, x), code


@intrinsic
def exp(typing: Any, x: Any) -> Any:
    """eˣ = 2ⁿ eʳ with |r| ≤ ½ ln 2: n the integer next to x / ln 2, eʳ by as many terms of its series as there are digits. ∞ and 0 where it
    overflows and underflows, subnormal between; NaN of NaN. Within 2 units in the last place."""
    single = x.scalar.bitwidth == 32
    terms, bits, bias, furthest = (8, 23, 127, 150.0) if single else (14, 52, 1023, 1100.0)
    high, low = (0.693359375, -2.12194440e-4) if single else (0.6931471803691238, 1.9082149292705877e-10)        # of ln 2; n·high is exact

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = args[0].type
        whole = ir.VectorType(ir.IntType(x.scalar.bitwidth), kind.count)
        number, integer = _everywhere(kind), _everywhere(whole)
        suffix = f"v{kind.count}f{x.scalar.bitwidth}"

        def call(name: str, result: Any, *given: Any) -> Any:
            return builder.call(cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, [y.type for y in given]), name), given)

        y = args[0]
        for relation, bound in (("<", -furthest), (">", furthest)):
            y = builder.select(builder.fcmp_ordered(relation, y, number(bound)), number(bound), y)
        n = call(f"llvm.rint.{suffix}", kind, builder.fmul(y, number(1 / math.log(2))))
        r = call(f"llvm.fma.{suffix}", kind, n, number(-high), y)
        r = call(f"llvm.fma.{suffix}", kind, n, number(-low), r)
        sums = number(1 / math.factorial(terms - 1))
        for i in reversed(range(terms - 1)):
            sums = call(f"llvm.fma.{suffix}", kind, sums, r, number(1 / math.factorial(i)))
        power = builder.fptosi(builder.select(builder.fcmp_ordered("==", n, n), n, number(0.0)), whole)           # of NaN none; r is NaN then
        half = builder.ashr(power, integer(1))
        for part in (half, builder.sub(power, half)):                                # in two steps, since 2ⁿ alone may not be a number
            scale = builder.bitcast(builder.shl(builder.add(part, integer(bias)), integer(bits)), kind)
            sums = call(f"llvm.fma.{suffix}", kind, sums, scale, number(0.0))        # products LLVM may put in another order
        return sums

    return x(x), code


@intrinsic
def elu1(typing: Any, x: Any, e: Any) -> Any:
    """φ(x) = x + 1 above 0, and e = eˣ, which is given, below. Eq. (7)."""
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = args[0].type
        number = _everywhere(kind)
        return builder.select(builder.fcmp_ordered(">", args[0], number(0.0)), builder.fadd(args[0], number(1.0)), args[1])

    return x(x, e), code


def _bounded(relation: str) -> Callable[..., Any]:
    """Where x stands in this relation to a number, the number; NaN of NaN."""
    def bounded(typing: Any, a: Any, x: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            bound = _spread(builder, args[0], args[1].type)
            return builder.select(builder.fcmp_ordered(relation, args[1], bound), bound, args[1])

        return x(x.scalar, x), code

    return bounded


at_most, at_least = intrinsic(_bounded(">")), intrinsic(_bounded("<"))              # min(a, x), max(a, x)


@intrinsic
def lanes(typing: Any, p: Any) -> Any:
    """How many of the numbers that p points to a vector has."""
    count = BYTES * 8 // p.dtype.bitwidth
    return types.intp(p), lambda context, builder, signature, args: ir.Constant(ir.IntType(types.intp.bitwidth), count)


@intrinsic
def zeros(typing: Any, p: Any) -> Any:
    """A vector of the kind of number that p points to."""
    kind = Vector(p.dtype)

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(context.get_value_type(kind), None)

    return kind(p), code


@intrinsic
def total(typing: Any, x: Any) -> Any:
    """The sum of a vector's numbers."""
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = args[0].type
        name = f"llvm.vector.reduce.fadd.v{kind.count}f{x.scalar.bitwidth}"
        f = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind.element, [kind.element, kind]), name)
        return builder.call(f, [ir.Constant(kind.element, 0.0), args[0]], fastmath=("reassoc",))

    return x.scalar(x), code


@intrinsic
def whole_registers(typing: Any) -> Any:
    """In a function that works on vectors: use the widest registers that there are. On some processors LLVM halves them else, for code that has
    few vectors, where the slower clock would cost more than it gains."""
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        for name in ("prefer-vector-width", "min-legal-vector-width"):
            set.add(builder.function.attributes, f'"{name}"="{8 * BYTES}"')          # past a list of names that llvmlite knows
        return context.get_dummy_value()

    return types.none(), code
