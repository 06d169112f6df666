/** Native and portable give the same bits: roundings, and the first of the largest values, wherever it is. */
import { float16BitsToFloat32, floatsToHalves } from '@lamina/tensor';
import { describe, expect, test } from 'vitest';
import { loadNativeAddon } from '../src/native-addon.ts';
import { vectorOps } from '../src/vector-ops.ts';
import { Random } from './support.ts';

const { addon } = loadNativeAddon();

test('the native ones are used where the addon loads', () => {
  if (addon !== null) expect(vectorOps()).toBe(addon);
});

describe('float16', () => {
  test('every value comes back as it was, and any number of them at any place', () => {
    const ops = vectorOps();
    const all = Float32Array.from({ length: 65536 }, (_, bits) => float16BitsToFloat32(bits)).filter(
      (value) => !Number.isNaN(value),
    );
    for (const count of [0, 1, 7, 16, 33, all.length - 5]) {
      const halves = new Uint16Array(count + 3).fill(7);
      ops.toHalves(all, 5, count, halves, 2);
      const expected = new Uint16Array(count + 3).fill(7);
      floatsToHalves(all, 5, count, expected, 2);
      expect(halves).toEqual(expected);
      const bytes = new Uint8Array(2 * count + 1);
      bytes.set(new Uint8Array(halves.buffer, 4, 2 * count), 1);
      const back = new Float32Array(count + 1).fill(3);
      ops.toFloats(bytes.subarray(1), count, back);
      expect(back.subarray(0, count)).toEqual(all.subarray(5, 5 + count));
      expect(back[count]).toBe(3);
    }
  });

  test.runIf(addon !== null)('ranges outside of the arrays are refused', () => {
    const ops = vectorOps();
    expect(() => ops.toHalves(new Float32Array(4), 1, 4, new Uint16Array(8), 0)).toThrow(/range/);
    expect(() => ops.toHalves(new Float32Array(4), 0, 4, new Uint16Array(8), 5)).toThrow(/range/);
    expect(() => ops.toHalves(new Float32Array(4), -1, 1, new Uint16Array(8), 0)).toThrow(/range/);
    expect(() => ops.toFloats(new Uint8Array(7), 4, new Float32Array(4))).toThrow(/range/);
    expect(() => ops.toFloats(new Uint8Array(8), 4, new Float32Array(3))).toThrow(/range/);
  });
});

/** By the definition. */
function plainArgmax(values: Float32Array): number {
  if (values.some(Number.isNaN)) return -1;
  const maximum = values.reduce((a, b) => Math.max(a, b), Number.NEGATIVE_INFINITY);
  return Number.isFinite(maximum) ? values.indexOf(maximum) : -1;
}

test('argmax is the first of the largest, or -1', () => {
  const { argmax } = vectorOps();
  const random = new Random(3);
  for (const length of [0, 1, 15, 16, 31, 1023, 1024, 1025, 2080, 49152]) {
    for (let round = 0; round < 20; round++) {
      // Few different values: many ties.
      const values = random.floats(length, 1).map((value) => (round % 2 === 0 ? value : Math.round(value * 4)));
      const at = Math.floor(random.next() * length);
      if (length > 0 && round % 5 === 1)
        values[at] = [Number.NaN, Number.POSITIVE_INFINITY, 5, Number.NEGATIVE_INFINITY][(round >> 1) % 4]!;
      if (round % 5 === 2) values.fill(Number.NEGATIVE_INFINITY, at);
      expect(argmax(values), `${length} values, round ${round}`).toBe(plainArgmax(values));
    }
  }
});

test('argmax of the largest and smallest finite values beside infinities', () => {
  const { argmax } = vectorOps();
  const most = 3.4028234663852886e38;
  for (const length of [3, 40, 3000]) {
    for (const [fill, at, value] of [
      [1, length - 1, most],
      [-most, 0, -most],
      [Number.NEGATIVE_INFINITY, length - 1, -most],
      [most, length - 1, Number.POSITIVE_INFINITY],
      [-most, length >> 1, Number.NEGATIVE_INFINITY],
    ] as const) {
      const values = new Float32Array(length).fill(fill);
      values[at] = value;
      expect(argmax(values), `${length} times ${fill}, ${value} at ${at}`).toBe(plainArgmax(values));
    }
  }
});
