/**
 * Owns what is done to long rows of numbers besides attention, by the native addon where there is one.
 *
 * Invariants
 * 1. Native and portable give the same bits, but for which NaN becomes of a NaN.
 */
import { floatsToHalves, halvesToFloats } from '@lamina/tensor';
import { loadNativeAddon } from './native-addon.ts';

export interface VectorOps {
  /** `count` values of `source` from `start` on, rounded to the nearest float16, to `target` from element `at` on. */
  toHalves(source: Float32Array, start: number, count: number, target: Uint16Array, at: number): void;
  /** The first `count` float16 of `source`, little-endian at any alignment. */
  toFloats(source: Uint8Array, count: number, target: Float32Array): void;
  /** Index of the first largest value; -1 when that is not finite or some value is NaN. -Infinity counts as a value. */
  argmax(values: Float32Array): number;
}

const PORTABLE: VectorOps = { toHalves: floatsToHalves, toFloats: halvesToFloats, argmax };

export function vectorOps(): VectorOps {
  return loadNativeAddon().addon ?? PORTABLE;
}

function argmax(values: Float32Array): number {
  let best = -1;
  let maximum = Number.NEGATIVE_INFINITY;
  for (let i = 0; i < values.length; i++) {
    const value = values[i]!;
    if (value > maximum) {
      maximum = value;
      best = i;
    } else if (!(value <= maximum)) return -1;
  }
  return maximum === Number.POSITIVE_INFINITY ? -1 : best;
}
