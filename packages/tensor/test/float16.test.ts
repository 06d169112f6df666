/** float16 and bfloat16 against their definitions, over every pattern. */
import { expect, test } from 'vitest';
import { bfloat16BitsToFloat32, float16BitsToFloat32, float16Table, float32ToFloat16Bits } from '../src/float16.ts';

/** IEEE 754 binary16: sign, 5 bits of exponent with bias 15, 10 bits of fraction. */
function defined(bits: number): number {
  const digits = bits.toString(2).padStart(16, '0');
  const exponent = Number.parseInt(digits.slice(1, 6), 2);
  const fraction = Number.parseInt(digits.slice(6), 2);
  const sign = digits[0] === '1' ? -1 : 1;
  if (exponent === 31) return fraction === 0 ? sign * Number.POSITIVE_INFINITY : Number.NaN;
  return exponent === 0 ? sign * (fraction / 1024) * 2 ** -14 : sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

const ALL = Array.from({ length: 65_536 }, (_, bits) => bits);
/** Every finite magnitude in order, then 2^16, where infinity begins to be nearer than the largest finite value. */
const MAGNITUDES = [...ALL.slice(0, 0x7c00).map(defined), 65_536];

/** The nearest float16 by search among all of them; of two at the same distance the one with an even pattern. */
function nearest(value: number): number {
  const sign = value < 0 || Object.is(value, -0) ? 0x8000 : 0;
  const magnitude = Math.min(Math.abs(value), 65_536);
  let low = 0;
  let high = 0x7c00;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (MAGNITUDES[middle]! <= magnitude) low = middle;
    else high = middle;
  }
  const below = magnitude - MAGNITUDES[low]!;
  const above = MAGNITUDES[high]! - magnitude;
  return sign | (below < above || (below === above && low % 2 === 0) ? low : high);
}

const floats = new Float32Array(1);
const words = new Uint32Array(floats.buffer);
function fromWord(word: number): number {
  words[0] = word;
  return floats[0]!;
}

test('every pattern has the value of its definition', () => {
  expect(ALL.filter((bits) => !Object.is(float16BitsToFloat32(bits), defined(bits)))).toEqual([]);
  const table = float16Table();
  expect(table).toHaveLength(65_536);
  expect(ALL.filter((bits) => !Object.is(table[bits], defined(bits)))).toEqual([]);
  expect(float16Table()).toBe(table);
});

test('every pattern that is a number comes back from its value, and NaN stays NaN', () => {
  const isNumber = (bits: number): boolean => !Number.isNaN(defined(bits));
  expect(ALL.filter((bits) => isNumber(bits) && float32ToFloat16Bits(defined(bits)) !== bits)).toEqual([]);
  expect(ALL.filter((bits) => !isNumber(bits))).toHaveLength(2 * 1023);
  for (const word of [0x7fc00000, 0x7f800001, 0xffc00000, 0xffffffff])
    expect(defined(float32ToFloat16Bits(fromWord(word)))).toBeNaN();
});

test('a float32 rounds to the nearest float16, ties to the even one', () => {
  const values: number[] = [0, -0, 65_519.996, 65_520, 1e38, -1e38, Number.POSITIVE_INFINITY, 2 ** -25, 2 ** -149];
  // Around every value of float16 and every tie between two: the float32 there, the one below and the one above.
  for (let bits = 0; bits < 0x7c00; bits++) {
    for (const middle of [MAGNITUDES[bits]!, (MAGNITUDES[bits]! + MAGNITUDES[bits + 1]!) / 2]) {
      floats[0] = middle;
      const word = words[0]!;
      values.push(fromWord(word), fromWord(word + 1), -fromWord(word));
      if (word > 0) values.push(fromWord(word - 1));
    }
  }
  // And the whole range of float32, in steps that share no factor with a power of two.
  for (let word = 0; word < 0x7f800000; word += 40_503) values.push(fromWord(word));
  const wrong = values.filter((value) => float32ToFloat16Bits(value) !== nearest(value));
  expect(values.length).toBeGreaterThan(250_000);
  expect(wrong.slice(0, 5)).toEqual([]);
});

test('every bfloat16 is the float32 with these upper bits', () => {
  const wrong = ALL.filter((bits) => {
    const expected = new DataView(Uint8Array.of(bits >> 8, bits & 0xff, 0, 0).buffer).getFloat32(0);
    return !Object.is(bfloat16BitsToFloat32(bits), expected);
  });
  expect(wrong).toEqual([]);
  expect([0x3f80, 0xc000, 0x0001, 0x7f80].map(bfloat16BitsToFloat32)).toEqual([1, -2, 2 ** -133, Infinity]);
});
