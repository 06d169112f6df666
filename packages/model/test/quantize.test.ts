/** Quantized rows give back what was quantized, within half a step. */
import { describe, expect, it } from 'vitest';
import { activationBitsOf } from '../src/activation-bits.ts';
import { quantizeBlocks, quantizeRows } from '../src/quantize.ts';
import { BLOCK_SIZE } from '../src/weight.ts';

function fromBlocks({ values, scales }: ReturnType<typeof quantizeBlocks>, width: number): number[] {
  const blocks = Math.ceil(width / BLOCK_SIZE);
  const rows = scales.length / blocks;
  return Array.from({ length: rows * width }, (_, i) => {
    const [row, column] = [Math.floor(i / width), i % width];
    const element = row * blocks * BLOCK_SIZE + column;
    const code = (values[element >> 1]! >> ((element & 1) * 4)) & 15;
    // No negative zero.
    return (code - 8) * scales[row * blocks + Math.floor(column / BLOCK_SIZE)]! + 0;
  });
}

function fromRows({ values, scales }: ReturnType<typeof quantizeRows>, width: number): number[] {
  return Array.from(values, (value, i) => value * scales[Math.floor(i / width)]! + 0);
}

const sines = (width: number): Float32Array =>
  Float32Array.from({ length: 5 * width }, (_, i) => Math.sin(i * 1.7) * (1 + (i % 7)));

describe('quantizeBlocks', () => {
  it.each([BLOCK_SIZE, 3 * BLOCK_SIZE, BLOCK_SIZE + 8])('keeps rows of %d values', (width) => {
    const source = sines(width);
    const quantized = quantizeBlocks(source, width);
    const blocks = Math.ceil(width / BLOCK_SIZE);
    expect(quantized.values).toHaveLength((5 * blocks * BLOCK_SIZE) / 2);
    expect(quantized.scales).toHaveLength(5 * blocks);
    const back = fromBlocks(quantized, width);
    // The largest value of a block may be clipped by a quarter.
    for (const [i, value] of source.entries()) expect(Math.abs(back[i]! - value)).toBeLessThan(0.25 * 7);
  });

  it('keeps zeros, and values that are whole steps, exactly', () => {
    const width = BLOCK_SIZE;
    expect(fromBlocks(quantizeBlocks(new Float32Array(2 * width), width), width)).toEqual(Array(2 * width).fill(0));
    const steps = Float32Array.from({ length: width }, (_, i) => (i === 0 ? -8 : (i % 8) - 3) * 0.25);
    expect(fromBlocks(quantizeBlocks(steps, width), width)).toEqual([...steps]);
  });
});

describe('quantizeRows', () => {
  it.each([32, 96, 41])('keeps rows of %d values within half a step of their largest', (width) => {
    const source = sines(width);
    const back = fromRows(quantizeRows(source, width), width);
    expect(back).toHaveLength(source.length);
    for (let row = 0; row < 5; row++) {
      const values = source.subarray(row * width, (row + 1) * width);
      const largest = Math.max(...values.map(Math.abs));
      for (const [i, value] of values.entries())
        expect(Math.abs(back[row * width + i]! - value)).toBeLessThanOrEqual((0.5001 * largest) / 127);
    }
  });

  it('keeps zeros, and values that are whole steps, exactly', () => {
    expect(fromRows(quantizeRows(new Float32Array(64), 32), 32)).toEqual(Array(64).fill(0));
    const steps = Float32Array.from({ length: 32 }, (_, i) => (i === 5 ? -127 : i * 8 - 124) * 0.25);
    expect(fromRows(quantizeRows(steps, 32), 32)).toEqual([...steps]);
  });
});

describe('activationBitsOf', () => {
  it.each([
    ['x64', 'flags : avx2 avx512f avx512_vnni', 8],
    ['x64', 'flags : avx2 avx_vnni\nflags : avx2 avx_vnni', 8],
    ['x64', 'flags : avx2 avx512f avx512bw', 7],
    ['x64', '', 7],
    ['arm64', '', 8],
  ])('%s with "%s": %d', (arch, cpuInfo, bits) => {
    expect(activationBitsOf(arch, cpuInfo)).toBe(bits);
  });
});
