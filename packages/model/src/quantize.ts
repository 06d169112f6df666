/**
 * Owns the quantization of float32 rows: to 4 bits in blocks, in the layout of MatMulNBits and GatherBlockQuantized, and
 * to integers with one scale per row, for the integer products of linear.ts.
 *
 * Invariants
 * 1. A 4-bit value is (q - 8) * scale of its block: symmetric, zero exact.
 *    (Measured on lamina-tiny: zero points of their own cost memory and gave a worse perplexity.)
 * 2. A row whose width is no multiple of the block size ends with zeros.
 * 3. The same values give the same bytes: a build that goes on where another was killed rests on it.
 */
import { BLOCK_SIZE } from './weight.ts';

export interface QuantizedValues {
  readonly values: Uint8Array | Int8Array;
  readonly scales: Float32Array;
}

/**
 * Scales that are tried, as fractions of the one that reaches the largest value: the one of least squared error wins.
 * Clipping the largest of 32 values costs less than a coarser step for the other 31, where there are few steps.
 */
const SCALE_FRACTIONS: readonly number[] = [1, 0.95, 0.9, 0.85, 0.8, 0.75];
const ZERO_POINT = 8;
const MAX_INTEGER = 127;

/**
 * Quantizes whole rows of `width` finite values to integers.
 * @returns values int8 [rows, width], scales [rows].
 */
export function quantizeRows(source: Float32Array, width: number): QuantizedValues {
  const rows = source.length / width;
  const values = new Int8Array(source.length);
  const scales = new Float32Array(rows);
  for (let row = 0; row < rows; row++) {
    const end = (row + 1) * width;
    let magnitude = 0;
    for (let i = row * width; i < end; i++) magnitude = Math.max(magnitude, Math.abs(source[i]!));
    const scale = Math.fround(magnitude / MAX_INTEGER);
    scales[row] = scale;
    if (scale === 0) continue;
    for (let i = row * width; i < end; i++) {
      values[i] = Math.max(-MAX_INTEGER, Math.min(MAX_INTEGER, Math.round(source[i]! / scale)));
    }
  }
  return { values, scales };
}

/**
 * Quantizes whole rows of `width` finite values to 4 bits.
 * @returns values uint8 [rows, blocks, BLOCK_SIZE / 2], of two values the first in the low half; scales [rows, blocks].
 */
export function quantizeBlocks(source: Float32Array, width: number): QuantizedValues {
  const rows = source.length / width;
  const blocks = Math.ceil(width / BLOCK_SIZE);
  const values = new Uint8Array((rows * blocks * BLOCK_SIZE) / 2);
  const scales = new Float32Array(rows * blocks);
  const block = new Float32Array(BLOCK_SIZE);
  let at = 0;
  for (let row = 0; row < rows; row++) {
    for (let i = 0; i < blocks; i++) {
      const start = row * width + i * BLOCK_SIZE;
      const length = Math.min(BLOCK_SIZE, (row + 1) * width - start);
      for (let j = 0; j < BLOCK_SIZE; j++) block[j] = j < length ? source[start + j]! : 0;
      const scale = bestScale(block);
      scales[row * blocks + i] = scale;
      const inverse = scale === 0 ? 0 : 1 / scale;
      for (let j = 0; j < BLOCK_SIZE; j += 2) {
        values[at++] = codeOf(block[j]! * inverse) | (codeOf(block[j + 1]! * inverse) << 4);
      }
    }
  }
  return { values, scales };
}

/** The scale, of either sign: there is one more code on the negative side, which the largest value gets. */
function bestScale(block: Float32Array): number {
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
  const whole = Math.fround(largest / -ZERO_POINT);
  let best = whole;
  let leastError = Number.POSITIVE_INFINITY;
  for (const fraction of SCALE_FRACTIONS) {
    const scale = Math.fround(whole * fraction);
    const inverse = scale === 0 ? 0 : 1 / scale;
    let error = 0;
    for (let i = 0; i < BLOCK_SIZE; i++) {
      const difference = (codeOf(block[i]! * inverse) - ZERO_POINT) * scale - block[i]!;
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
function codeOf(steps: number): number {
  const code = steps + ZERO_POINT + 0.5;
  // Truncation is the floor here: a negative code is clipped first.
  return code <= 0 ? 0 : code >= 2 * ZERO_POINT ? 2 * ZERO_POINT - 1 : code | 0;
}
