/**
 * Owns the quantization of float32 rows in blocks, in the layout of MatMulNBits and GatherBlockQuantized.
 *
 * Invariants
 * 1. A value is (q - 2^(bits - 1)) * scale of its block, q an unsigned integer of `bits` bits: symmetric, zero exact.
 *    (Measured on lamina-tiny: zero points of their own cost memory and gave a worse perplexity.)
 * 2. A row whose width is no multiple of the block size ends with zeros.
 * 3. The same values give the same bytes: a build that goes on where another was killed rests on it.
 */
import { BLOCK_SIZE } from './weight.ts';

export interface QuantizedRows {
  /** [rows, blocks, BLOCK_SIZE * bits / 8]; of two 4-bit values the first is in the low half. */
  readonly values: Uint8Array;
  /** [rows, blocks] */
  readonly scales: Float32Array;
}

/**
 * Scales that are tried, as fractions of the one that reaches the largest value: the one of least squared error wins.
 * Clipping the largest of 32 values costs less than a coarser step for the other 31, where there are few steps.
 */
const SCALE_FRACTIONS: Readonly<Record<4 | 8, readonly number[]>> = { 4: [1, 0.95, 0.9, 0.85, 0.8, 0.75], 8: [1] };

/** Quantizes whole rows of `width` finite values. */
export function quantizeRows(source: Float32Array, width: number, bits: 4 | 8): QuantizedRows {
  const rows = source.length / width;
  const blocks = Math.ceil(width / BLOCK_SIZE);
  const zeroPoint = 2 ** (bits - 1);
  const values = new Uint8Array((rows * blocks * BLOCK_SIZE * bits) / 8);
  const scales = new Float32Array(rows * blocks);
  const block = new Float32Array(BLOCK_SIZE);
  const codes = new Uint8Array(BLOCK_SIZE);
  let at = 0;
  for (let row = 0; row < rows; row++) {
    for (let i = 0; i < blocks; i++) {
      const start = row * width + i * BLOCK_SIZE;
      const length = Math.min(BLOCK_SIZE, (row + 1) * width - start);
      for (let j = 0; j < BLOCK_SIZE; j++) block[j] = j < length ? source[start + j]! : 0;
      const scale = bestScale(block, zeroPoint, SCALE_FRACTIONS[bits]);
      scales[row * blocks + i] = scale;
      const inverse = scale === 0 ? 0 : 1 / scale;
      for (let j = 0; j < BLOCK_SIZE; j++) codes[j] = codeOf(block[j]! * inverse, zeroPoint);
      if (bits === 8) {
        values.set(codes, at);
        at += BLOCK_SIZE;
      } else {
        for (let j = 0; j < BLOCK_SIZE; j += 2) values[at++] = codes[j]! | (codes[j + 1]! << 4);
      }
    }
  }
  return { values, scales };
}

/** The scale, of either sign: there is one more code on the negative side, which the largest value gets. */
function bestScale(block: Float32Array, zeroPoint: number, fractions: readonly number[]): number {
  let largest = 0;
  let magnitude = 0;
  for (let i = 0; i < BLOCK_SIZE; i++) {
    const value = block[i]!;
    if (value > magnitude || -value > magnitude) {
      largest = value;
      magnitude = value < 0 ? -value : value;
    }
  }
  if (largest === 0) return 0;
  const whole = Math.fround(largest / -zeroPoint);
  if (fractions.length === 1) return whole;
  let best = whole;
  let leastError = Number.POSITIVE_INFINITY;
  for (const fraction of fractions) {
    const scale = Math.fround(whole * fraction);
    const inverse = scale === 0 ? 0 : 1 / scale;
    let error = 0;
    for (let i = 0; i < BLOCK_SIZE; i++) {
      const difference = (codeOf(block[i]! * inverse, zeroPoint) - zeroPoint) * scale - block[i]!;
      error += difference * difference;
    }
    if (error < leastError) {
      leastError = error;
      best = scale;
    }
  }
  return best;
}

/** `steps` rounded to the nearest code. */
function codeOf(steps: number, zeroPoint: number): number {
  const code = steps + zeroPoint + 0.5;
  // Truncation is the floor here: a negative code is clipped first.
  return code <= 0 ? 0 : code >= 2 * zeroPoint ? 2 * zeroPoint - 1 : code | 0;
}
