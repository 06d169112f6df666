/**
 * Owns the evaluation of operators that move elements and of those that make and look at shapes.
 */
import { elementsOf, TYPE } from './element-types.ts';
import { publishedTensor } from './onnx-file.ts';
import type { Operands, Rule } from './operands.ts';
import { readTensorBytes } from './tensor-bytes.ts';
import {
  broadcast,
  broadcastStrides,
  gatherStrided,
  knownValue,
  lazyValue,
  sizeOf,
  stridesOf,
  type Value,
} from './values.ts';

/** `value` read with strides from a start: what most layout operators are. */
function restride(value: Value, dims: readonly number[], strides: readonly number[], start = 0): Value {
  return lazyValue(value.dataType, dims, () => {
    const numbers = value.numbers();
    return numbers === null ? null : gatherStrided(numbers, dims, strides, start);
  });
}

function reshaped(value: Value, dims: readonly number[]): Value {
  if (sizeOf(dims) !== sizeOf(value.dims)) throw new RangeError(`[${value.dims}] cannot become [${dims}]`);
  return lazyValue(value.dataType, dims, () => value.numbers());
}

const axisOf = (axis: number, rank: number): number => (axis < 0 ? axis + rank : axis);

const integers = (values: readonly number[], dims: readonly number[] = [values.length]): Value =>
  knownValue(TYPE.int64, dims, Float64Array.from(values));

const reshape: Rule = (operands) => {
  const x = operands.in(0);
  const allowsZero = operands.int('allowzero', 0) === 1;
  const dims = operands.numbers(1).map((dim, i) => (dim === 0 && !allowsZero ? (x.dims[i] ?? 0) : dim));
  const known = sizeOf(dims.filter((dim) => dim !== -1));
  return [
    reshaped(
      x,
      dims.map((dim) => (dim === -1 ? sizeOf(x.dims) / known : dim)),
    ),
  ];
};

const transpose: Rule = (operands) => {
  const x = operands.in(0);
  const order = operands.ints('perm') ?? x.dims.map((_, i) => x.dims.length - 1 - i);
  const strides = stridesOf(x.dims);
  return [
    restride(
      x,
      order.map((axis) => x.dims[axis]!),
      order.map((axis) => strides[axis]!),
    ),
  ];
};

const unsqueeze: Rule = (operands) => {
  const x = operands.in(0);
  const given = operands.numbersOf('axes', 1) ?? [];
  const axes = new Set(given.map((axis) => axisOf(axis, x.dims.length + given.length)));
  const rest = [...x.dims];
  const dims = Array.from({ length: x.dims.length + axes.size }, (_, i) => (axes.has(i) ? 1 : rest.shift()!));
  return [reshaped(x, dims)];
};

const squeeze: Rule = (operands) => {
  const x = operands.in(0);
  const given = operands.numbersOf('axes', 1)?.map((axis) => axisOf(axis, x.dims.length));
  return [
    reshaped(
      x,
      x.dims.filter((dim, i) => (given === undefined ? dim !== 1 : !given.includes(i))),
    ),
  ];
};

const concat: Rule = (operands) => {
  const parts = Array.from({ length: operands.count }, (_, i) => operands.in(i));
  const [first] = parts;
  if (first === undefined) throw new TypeError('nothing to join');
  const axis = axisOf(operands.int('axis', 0), first.dims.length);
  const sizes = parts.map((part) => part.dims[axis]!);
  const other = parts.find((part) => part.dims.with(axis, 0).join() !== first.dims.with(axis, 0).join());
  if (other !== undefined) throw new RangeError(`[${first.dims}] and [${other.dims}] do not fit each other`);
  const dims = first.dims.with(
    axis,
    sizes.reduce((a, b) => a + b, 0),
  );
  const inner = sizeOf(first.dims.slice(axis + 1));
  return [
    lazyValue(first.dataType, dims, () => {
      const numbers = parts.map((part) => part.numbers());
      const out = new Float64Array(sizeOf(dims));
      let start = 0;
      for (const [i, part] of numbers.entries()) {
        if (part === null) return null;
        const run = sizes[i]! * inner;
        for (let row = 0; row * run < part.length; row++) {
          out.set(part.subarray(row * run, (row + 1) * run), row * dims[axis]! * inner + start);
        }
        start += run;
      }
      return out;
    }),
  ];
};

const split: Rule = (operands) => {
  const x = operands.in(0);
  const axis = axisOf(operands.int('axis', 0), x.dims.length);
  const count = operands.node.outputs.length;
  const part = Math.ceil(x.dims[axis]! / count);
  const even = Array.from({ length: count }, (_, i) => Math.min(part, x.dims[axis]! - i * part));
  let start = 0;
  return (operands.numbersOf('split', 1) ?? even).map((size) => {
    const from = start;
    start += size;
    return restride(x, x.dims.with(axis, size), stridesOf(x.dims), from * stridesOf(x.dims)[axis]!);
  });
};

const slice: Rule = (operands) => {
  const x = operands.in(0);
  const starts = operands.numbersOf('starts', 1) ?? [];
  const ends = operands.numbersOf('ends', 2) ?? [];
  const axes = operands.numbersOf('axes', 3) ?? starts.map((_, i) => i);
  const steps = operands.optional(4) === undefined ? starts.map(() => 1) : operands.numbers(4);
  const dims = [...x.dims];
  const strides = stridesOf(x.dims);
  let from = 0;
  for (const [i, given] of axes.entries()) {
    const axis = axisOf(given, x.dims.length);
    const [size, step] = [x.dims[axis]!, steps[i]!];
    const clamp = (at: number, low: number, high: number): number =>
      Math.min(Math.max(at < 0 ? at + size : at, low), high);
    const start = clamp(starts[i]!, 0, step > 0 ? size : size - 1);
    const end = clamp(ends[i]!, step > 0 ? 0 : -1, size);
    dims[axis] = Math.max(0, Math.ceil((end - start) / step));
    from += start * strides[axis]!;
    strides[axis]! *= step;
  }
  return [restride(x, dims, strides, from)];
};

const gather: Rule = (operands) => {
  const [x, indices] = [operands.in(0), operands.in(1)];
  const axis = axisOf(operands.int('axis', 0), x.dims.length);
  const dims = [...x.dims.slice(0, axis), ...indices.dims, ...x.dims.slice(axis + 1)];
  const inner = sizeOf(x.dims.slice(axis + 1));
  const size = x.dims[axis]!;
  return [
    lazyValue(x.dataType, dims, () => {
      // The indices are looked at first: a table is read only if they are known.
      const rows = indices.numbers();
      const numbers = rows === null ? null : x.numbers();
      if (rows === null || numbers === null) return null;
      const out = new Float64Array(sizeOf(dims));
      for (let outer = 0, to = 0; outer < sizeOf(x.dims.slice(0, axis)); outer++) {
        for (const row of rows) {
          const at = (outer * size + (row < 0 ? row + size : row)) * inner;
          out.set(numbers.subarray(at, at + inner), to);
          to += inner;
        }
      }
      return out;
    }),
  ];
};

const expand: Rule = (operands) => {
  const x = operands.in(0);
  const dims = broadcast(x.dims, operands.numbers(1));
  return [restride(x, dims, broadcastStrides(x.dims, dims))];
};

const tile: Rule = (operands) => {
  const x = operands.in(0);
  const repeats = operands.numbers(1);
  const doubled = x.dims.flatMap((dim, i) => [repeats[i]!, dim]);
  const strides = stridesOf(x.dims).flatMap((stride) => [0, stride]);
  const repeated = restride(x, doubled, strides);
  return [
    reshaped(
      repeated,
      x.dims.map((dim, i) => dim * repeats[i]!),
    ),
  ];
};

const trilu: Rule = (operands) => {
  const x = operands.in(0);
  const offset = operands.optional(1) === undefined ? 0 : (operands.numbers(1)[0] ?? 0);
  const isUpper = operands.int('upper', 1) === 1;
  const [rows = 1, columns = 1] = x.dims.slice(-2);
  const keeps = (i: number): boolean => {
    const distance = (i % columns) - (Math.floor(i / columns) % rows);
    return isUpper ? distance >= offset : distance <= offset;
  };
  return [lazyValue(x.dataType, x.dims, () => x.numbers()?.map((value, i) => (keeps(i) ? value : 0)) ?? null)];
};

const constantOfShape: Rule = (operands) => {
  const proto = operands.node.attributes.get('value')?.t;
  const tensor = proto ? publishedTensor('', proto) : undefined;
  const fill = tensor === undefined ? 0 : (elementsOf(tensor.dataType, readTensorBytes(tensor))?.[0] ?? 0);
  const dims = operands.numbers(0);
  return [lazyValue(tensor?.dataType ?? TYPE.float, dims, () => new Float64Array(sizeOf(dims)).fill(fill))];
};

const range: Rule = (operands) => {
  const [start = 0, limit = 0, delta = 1] = [0, 1, 2].map((i) => operands.numbers(i)[0] ?? 0);
  const length = Math.max(0, Math.ceil((limit - start) / delta));
  const numbers = Float64Array.from({ length }, (_, i) => start + i * delta);
  return [knownValue(operands.in(0).dataType, [length], numbers)];
};

const gatherNd: Rule = (operands) => {
  const [x, indices] = [operands.in(0), operands.in(1)];
  if (operands.int('batch_dims', 0) !== 0) throw new TypeError('batch_dims are not supported');
  const depth = indices.dims.at(-1) ?? 1;
  const dims = [...indices.dims.slice(0, -1), ...x.dims.slice(depth)];
  const inner = sizeOf(x.dims.slice(depth));
  const strides = stridesOf(x.dims);
  return [
    lazyValue(x.dataType, dims, () => {
      const [numbers, at] = [x.numbers(), indices.numbers()];
      if (numbers === null || at === null) return null;
      const out = new Float64Array(sizeOf(dims));
      for (let i = 0; i * depth < at.length; i++) {
        let from = 0;
        for (let axis = 0; axis < depth; axis++) from += axisOf(at[i * depth + axis]!, x.dims[axis]!) * strides[axis]!;
        out.set(numbers.subarray(from, from + inner), i * inner);
      }
      return out;
    }),
  ];
};

/** Updates whole rows or elements of the data: index tuples name a prefix of its dimensions. */
const scatterNd: Rule = (operands) => {
  const [x, indices, updates] = [operands.in(0), operands.in(1), operands.in(2)];
  const depth = indices.dims.at(-1) ?? 1;
  const inner = sizeOf(x.dims.slice(depth));
  const strides = stridesOf(x.dims);
  return [
    lazyValue(x.dataType, x.dims, () => {
      const [out, at, values] = [x.numbers()?.slice() ?? null, indices.numbers(), updates.numbers()];
      if (out === null || at === null || values === null) return null;
      for (let i = 0; i * depth < at.length; i++) {
        let to = 0;
        for (let axis = 0; axis < depth; axis++) to += axisOf(at[i * depth + axis]!, x.dims[axis]!) * strides[axis]!;
        out.set(values.subarray(i * inner, (i + 1) * inner), to);
      }
      return out;
    }),
  ];
};

function shape(operands: Operands): Value[] {
  const { dims } = operands.in(0);
  return [integers(dims.slice(operands.int('start', 0), operands.int('end', dims.length)))];
}

const flatten: Rule = (operands) => {
  const x = operands.in(0);
  const axis = axisOf(operands.int('axis', 1), x.dims.length);
  return [reshaped(x, [sizeOf(x.dims.slice(0, axis)), sizeOf(x.dims.slice(axis))])];
};

export const LAYOUT_RULES: Readonly<Record<string, Rule>> = {
  Reshape: reshape,
  Transpose: transpose,
  Unsqueeze: unsqueeze,
  Squeeze: squeeze,
  Concat: concat,
  Split: split,
  Slice: slice,
  Gather: gather,
  GatherND: gatherNd,
  Expand: expand,
  Tile: tile,
  Trilu: trilu,
  ConstantOfShape: constantOfShape,
  Range: range,
  ScatterND: scatterNd,
  Shape: shape,
  Flatten: flatten,
  Size: (operands) => [integers([sizeOf(operands.in(0).dims)], [])],
};
