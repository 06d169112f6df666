/** Quantized rows give back what was quantized, within half a step. */
import { describe, expect, it } from 'vitest';
import { quantizeRows } from '../src/quantize.ts';

function dequantize(quantized: ReturnType<typeof quantizeRows>, width: number, bits: 4 | 8): number[] {
  const { values, scales } = quantized;
  const blocks = Math.ceil(width / 32);
  const rows = scales.length / blocks;
  return Array.from({ length: rows * width }, (_, i) => {
    const [row, column] = [Math.floor(i / width), i % width];
    const element = row * blocks * 32 + column;
    const code = bits === 8 ? values[element]! : (values[element >> 1]! >> ((element & 1) * 4)) & 15;
    // No negative zero.
    return (code - 2 ** (bits - 1)) * scales[row * blocks + (column >> 5)]! + 0;
  });
}

describe.each([4, 8] as const)('quantizeRows to %d bits', (bits) => {
  it.each([32, 96, 40])('keeps rows of %d values', (width) => {
    const source = Float32Array.from({ length: 5 * width }, (_, i) => Math.sin(i * 1.7) * (1 + (i % 7)));
    const quantized = quantizeRows(source, width, bits);
    const blocks = Math.ceil(width / 32);
    expect(quantized.values).toHaveLength(5 * blocks * 4 * bits);
    expect(quantized.scales).toHaveLength(5 * blocks);
    const back = dequantize(quantized, width, bits);
    // Half a step; one of 4 bits may clip a quarter of the largest value.
    const bound = bits === 8 ? 7 / 127 : 0.25 * 7;
    for (const [i, value] of source.entries()) expect(Math.abs(back[i]! - value)).toBeLessThan(bound);
  });

  it('keeps zeros, and values that are whole steps, exactly', () => {
    expect(dequantize(quantizeRows(new Float32Array(64), 32, bits), 32, bits)).toEqual(Array(64).fill(0));
    const half = 2 ** (bits - 1);
    const steps = Float32Array.from({ length: 32 }, (_, i) => (i === 0 ? -half : (i % half) - 3) * 0.25);
    expect(dequantize(quantizeRows(steps, 32, bits), 32, bits)).toEqual([...steps]);
  });
});
