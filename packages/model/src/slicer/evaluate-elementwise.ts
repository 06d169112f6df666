/**
 * Owns the evaluation of operators that work element by element, with broadcasting.
 */
import { isFloating, TYPE } from './element-types.ts';
import type { Operands, Rule } from './operands.ts';
import { broadcast, broadcastStrides, gatherStrided, lazyValue, shapeOnly, type Value } from './values.ts';

const sigmoid = (x: number): number => 1 / (1 + Math.exp(-x));
const truth = (holds: boolean): number => (holds ? 1 : 0);

function unary(compute: (x: number, operands: Operands) => number, dataType?: number): Rule {
  return (operands) => {
    const x = operands.in(0);
    return [
      lazyValue(dataType ?? x.dataType, x.dims, () => x.numbers()?.map((value) => compute(value, operands)) ?? null),
    ];
  };
}

function binary(compute: (a: number, b: number, dataType: number) => number, dataType?: number): Rule {
  return (operands) => {
    let result = operands.in(0);
    for (let i = 1; i < operands.count; i++) result = combine(result, operands.in(i), compute, dataType);
    return [result];
  };
}

function combine(
  a: Value,
  b: Value,
  compute: (a: number, b: number, dataType: number) => number,
  dataType = a.dataType,
): Value {
  const dims = broadcast(a.dims, b.dims);
  return lazyValue(dataType, dims, () => {
    const [x, y] = [expanded(a, dims), expanded(b, dims)];
    return x === null || y === null ? null : x.map((value, i) => compute(value, y[i]!, a.dataType));
  });
}

function expanded(value: Value, dims: readonly number[]): Float64Array | null {
  const numbers = value.numbers();
  return numbers === null ? null : gatherStrided(numbers, dims, broadcastStrides(value.dims, dims));
}

const where: Rule = (operands) => {
  const [condition, a, b] = [operands.in(0), operands.in(1), operands.in(2)];
  const dims = broadcast(condition.dims, broadcast(a.dims, b.dims));
  return [
    lazyValue(a.dataType, dims, () => {
      const [c, x, y] = [expanded(condition, dims), expanded(a, dims), expanded(b, dims)];
      return c === null || x === null || y === null ? null : c.map((holds, i) => (holds !== 0 ? x[i]! : y[i]!));
    }),
  ];
};

function cast(x: Value, dataType: number): Value {
  const toInteger = !isFloating(dataType) && isFloating(x.dataType);
  return lazyValue(dataType, x.dims, () => {
    const numbers = x.numbers();
    if (dataType === TYPE.bool) return numbers?.map((value) => truth(value !== 0)) ?? null;
    return toInteger ? (numbers?.map(Math.trunc) ?? null) : numbers;
  });
}

const divide = (a: number, b: number, dataType: number): number => (isFloating(dataType) ? a / b : Math.trunc(a / b));

/** The activation functions below are only ever applied to what depends on the tokens: their shape is enough. */
const sameShape: Rule = (operands) => [shapeOnly(operands.in(0).dataType, operands.in(0).dims)];

export const ELEMENTWISE_RULES: Readonly<Record<string, Rule>> = {
  Abs: unary(Math.abs),
  Neg: unary((x) => -x),
  Sqrt: unary(Math.sqrt),
  Exp: unary(Math.exp),
  Log: unary(Math.log),
  Cos: unary(Math.cos),
  Sin: unary(Math.sin),
  Tanh: unary(Math.tanh),
  Sigmoid: unary(sigmoid),
  Relu: unary((x) => Math.max(0, x)),
  Reciprocal: unary((x) => 1 / x),
  Floor: unary(Math.floor),
  Ceil: unary(Math.ceil),
  Not: unary((x) => truth(x === 0)),
  IsNaN: unary((x) => truth(Number.isNaN(x)), TYPE.bool),
  IsInf: unary((x) => truth(Math.abs(x) === Number.POSITIVE_INFINITY), TYPE.bool),
  Dropout: unary((x) => x),
  Identity: unary((x) => x),
  Erf: sameShape,
  Gelu: sameShape,
  Swish: sameShape,
  Softplus: sameShape,
  HardSigmoid: sameShape,
  LeakyRelu: sameShape,
  Elu: sameShape,
  'com.microsoft.Gelu': sameShape,
  'com.microsoft.FastGelu': sameShape,
  'com.microsoft.BiasGelu': sameShape,
  'com.microsoft.QuickGelu': sameShape,
  Add: binary((a, b) => a + b),
  Sub: binary((a, b) => a - b),
  Mul: binary((a, b) => a * b),
  Div: binary(divide),
  Pow: binary((a, b) => a ** b),
  Min: binary(Math.min),
  Max: binary(Math.max),
  Sum: binary((a, b) => a + b),
  Mod: binary((a, b) => a - b * Math.floor(a / b)),
  Equal: binary((a, b) => truth(a === b), TYPE.bool),
  Less: binary((a, b) => truth(a < b), TYPE.bool),
  LessOrEqual: binary((a, b) => truth(a <= b), TYPE.bool),
  Greater: binary((a, b) => truth(a > b), TYPE.bool),
  GreaterOrEqual: binary((a, b) => truth(a >= b), TYPE.bool),
  And: binary((a, b) => truth(a !== 0 && b !== 0)),
  Or: binary((a, b) => truth(a !== 0 || b !== 0)),
  Xor: binary((a, b) => truth((a !== 0) !== (b !== 0))),
  Where: where,
  Cast: (operands) => [cast(operands.in(0), operands.int('to', TYPE.float))],
  CastLike: (operands) => [cast(operands.in(0), operands.in(1).dataType)],
  Clip: (operands) => {
    const [x, low, high] = [operands.in(0), operands.optional(1), operands.optional(2)];
    return [
      lazyValue(x.dataType, x.dims, () => {
        const from = low?.numbers()?.[0] ?? operands.float('min', Number.NEGATIVE_INFINITY);
        const to = high?.numbers()?.[0] ?? operands.float('max', Number.POSITIVE_INFINITY);
        return x.numbers()?.map((value) => Math.min(Math.max(value, from), to)) ?? null;
      }),
    ];
  },
  CumSum: (operands) => {
    const x = operands.in(0);
    const axis = operands.numbers(1)[0] ?? 0;
    const at = axis < 0 ? axis + x.dims.length : axis;
    const inner = x.dims.slice(at + 1).reduce((a, b) => a * b, 1);
    const size = x.dims[at] ?? 1;
    const isPlain = operands.int('exclusive', 0) === 0 && operands.int('reverse', 0) === 0;
    return [
      lazyValue(x.dataType, x.dims, () => {
        const sums = x.numbers()?.slice() ?? null;
        if (sums === null || !isPlain) return null;
        for (let i = 0; i < sums.length; i++) if (Math.floor(i / inner) % size > 0) sums[i]! += sums[i - inner]!;
        return sums;
      }),
    ];
  },
};
