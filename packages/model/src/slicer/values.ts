/**
 * Owns the values of an evaluation: shapes always, numbers where they can be known and are asked for.
 *
 * Invariants
 * 1. Numbers are computed when they are asked for, once; a value whose numbers depend on the tokens or on a weight
 *    matrix has none.
 */

export interface Value {
  readonly dataType: number;
  readonly dims: readonly number[];
  /** Row-major; null if they cannot be known. */
  readonly numbers: () => Float64Array | null;
}

/** More elements than any mask or table that is looked at has. */
const MAX_ELEMENTS = 48 * 1024 * 1024;

export function lazyValue(dataType: number, dims: readonly number[], compute: () => Float64Array | null): Value {
  let numbers: Float64Array | null | undefined;
  return {
    dataType,
    dims,
    numbers: () => {
      if (numbers === undefined) numbers = sizeOf(dims) > MAX_ELEMENTS ? null : compute();
      return numbers;
    },
  };
}

export function knownValue(dataType: number, dims: readonly number[], numbers: Float64Array): Value {
  return { dataType, dims, numbers: () => numbers };
}

/** A value of which only the shape matters. */
export function shapeOnly(dataType: number, dims: readonly number[]): Value {
  return { dataType, dims, numbers: () => null };
}

export function sizeOf(dims: readonly number[]): number {
  return dims.reduce((a, b) => a * b, 1);
}

/** Elements from one index of a dimension to the next. */
export function stridesOf(dims: readonly number[]): number[] {
  const strides = dims.map(() => 1);
  for (let i = dims.length - 2; i >= 0; i--) strides[i] = strides[i + 1]! * dims[i + 1]!;
  return strides;
}

export function broadcast(a: readonly number[], b: readonly number[]): number[] {
  const rank = Math.max(a.length, b.length);
  return Array.from({ length: rank }, (_, i) => {
    const x = a[a.length - rank + i] ?? 1;
    const y = b[b.length - rank + i] ?? 1;
    if (x !== y && x !== 1 && y !== 1) throw new RangeError(`[${a}] and [${b}] do not fit each other`);
    return x === 1 ? y : x;
  });
}

/** Strides with which `dims` is read as the larger `target`; 0 where it repeats. */
export function broadcastStrides(dims: readonly number[], target: readonly number[]): number[] {
  const strides = stridesOf(dims);
  const skipped = target.length - dims.length;
  return target.map((_, i) => (i < skipped || dims[i - skipped] === 1 ? 0 : strides[i - skipped]!));
}

/** Source index of every element of `dims` when read with `strides` from `start`. */
export function gatherStrided(
  source: Float64Array,
  dims: readonly number[],
  strides: readonly number[],
  start = 0,
): Float64Array {
  const out = new Float64Array(sizeOf(dims));
  const index = dims.map(() => 0);
  let at = start;
  for (let i = 0; i < out.length; i++) {
    out[i] = source[at]!;
    for (let axis = dims.length - 1; axis >= 0; axis--) {
      at += strides[axis]!;
      if (++index[axis]! < dims[axis]!) break;
      at -= strides[axis]! * dims[axis]!;
      index[axis] = 0;
    }
  }
  return out;
}
