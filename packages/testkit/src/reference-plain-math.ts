/**
 * Owns the arithmetic of the plain float64 forward passes: products, norms, activations, attention.
 *
 * Invariants
 * 1. One row at a time; nothing is in place.
 */

/** One row per token. */
export type Rows = Float64Array[];

export interface PlainTensor {
  readonly values: Float64Array;
  readonly shape: readonly number[];
}

/** W x, for W [outputs, inputs]. */
export function multiply({ values, shape }: PlainTensor, x: Float64Array): Float64Array {
  const [outputs = 0, inputs = 0] = shape;
  const y = new Float64Array(outputs);
  for (let n = 0; n < outputs; n++) {
    let sum = 0;
    for (let k = 0; k < inputs; k++) sum += values[n * inputs + k]! * x[k]!;
    y[n] = sum;
  }
  return y;
}

/** x W, for W [inputs, outputs]. */
export function multiplyConv1d({ values, shape }: PlainTensor, x: Float64Array): Float64Array {
  const [inputs = 0, outputs = 0] = shape;
  const y = new Float64Array(outputs);
  for (let k = 0; k < inputs; k++) for (let n = 0; n < outputs; n++) y[n]! += x[k]! * values[k * outputs + n]!;
  return y;
}

export function add(a: Float64Array, b: Float64Array): Float64Array {
  return a.map((value, i) => value + b[i]!);
}

export function rmsNorm(x: Float64Array, gamma: Float64Array, epsilon: number): Float64Array {
  const meanSquare = x.reduce((sum, value) => sum + value * value, 0) / x.length;
  return x.map((value, i) => (value / Math.sqrt(meanSquare + epsilon)) * gamma[i]!);
}

export function layerNorm(x: Float64Array, gamma: Float64Array, beta: Float64Array, epsilon: number): Float64Array {
  const mean = x.reduce((sum, value) => sum + value, 0) / x.length;
  const variance = x.reduce((sum, value) => sum + (value - mean) ** 2, 0) / x.length;
  return x.map((value, i) => ((value - mean) / Math.sqrt(variance + epsilon)) * gamma[i]! + beta[i]!);
}

/** Applies `norm` to each head of x by itself. */
export function perHead(x: Float64Array, headDim: number, norm: (head: Float64Array) => Float64Array): Float64Array {
  const y = new Float64Array(x.length);
  for (let at = 0; at < x.length; at += headDim) y.set(norm(x.slice(at, at + headDim)), at);
  return y;
}

export function silu(x: number): number {
  return x / (1 + Math.exp(-x));
}

/** gelu_new, gelu_pytorch_tanh. */
export function geluTanh(x: number): number {
  return 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3)));
}

/** x times the normal distribution function, as a Taylor series of erf. */
export function gelu(x: number): number {
  const z = x / Math.SQRT2;
  if (Math.abs(z) > 5) return Math.max(x, 0);
  let [sum, term] = [z, z];
  for (let n = 1; n < 150; n++) {
    term *= -(z * z) / n;
    sum += term / (2 * n + 1);
  }
  return 0.5 * x * (1 + (2 / Math.sqrt(Math.PI)) * sum);
}

export function tanhCap(value: number, cap: number): number {
  return Math.tanh(value / cap) * cap;
}

export interface PlainAttention {
  readonly numHeads: number;
  readonly numKvHeads: number;
  readonly headDim: number;
  readonly scale: number;
  readonly softcap?: number | null;
  /** A query at q sees the keys at q - window + 1 .. q; null: 0 .. q. */
  readonly window?: number | null;
}

/** Causal attention of a whole sequence. */
export function attend(queries: Rows, keys: Rows, values: Rows, attention: PlainAttention): Rows {
  const { numHeads, numKvHeads, headDim, scale, softcap = null, window = null } = attention;
  return queries.map((query, position) => {
    const output = new Float64Array(numHeads * headDim);
    const first = window === null ? 0 : Math.max(0, position - window + 1);
    for (let head = 0; head < numHeads; head++) {
      const kvHead = Math.floor((head * numKvHeads) / numHeads);
      const scores: number[] = [];
      for (let k = first; k <= position; k++) {
        let dot = 0;
        for (let d = 0; d < headDim; d++) dot += query[head * headDim + d]! * keys[k]![kvHead * headDim + d]!;
        scores.push(softcap === null ? dot * scale : tanhCap(dot * scale, softcap));
      }
      const largest = Math.max(...scores);
      const weights = scores.map((score) => Math.exp(score - largest));
      const total = weights.reduce((a, b) => a + b, 0);
      for (const [i, weight] of weights.entries()) {
        const value = values[first + i]!;
        for (let d = 0; d < headDim; d++) {
          output[head * headDim + d]! += (weight / total) * value[kvHead * headDim + d]!;
        }
      }
    }
    return output;
  });
}
