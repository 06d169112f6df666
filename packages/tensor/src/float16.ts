/**
 * Owns the conversion between IEEE 754 binary16, bfloat16 and float32 (round to nearest, ties to even).
 */

const f32 = new Float32Array(1);
const u32 = new Uint32Array(f32.buffer);

/** Bits of the float16 nearest to `value`; overflow becomes infinity, NaN stays NaN. */
export function float32ToFloat16Bits(value: number): number {
  f32[0] = value;
  const bits = u32[0]!;
  const sign = (bits >>> 16) & 0x8000;
  const magnitude = bits & 0x7fffffff;
  if (magnitude >= 0x7f800000) return sign | (magnitude > 0x7f800000 ? 0x7e00 : 0x7c00);
  if (magnitude >= 0x477ff000) return sign | 0x7c00;
  if (magnitude < 0x38800000) {
    // Subnormal in float16: value * 2^24 is its integer significand.
    const scaled = Math.abs(value) * 16777216;
    const floor = Math.floor(scaled);
    const rest = scaled - floor;
    const roundUp = rest > 0.5 || (rest === 0.5 && (floor & 1) === 1);
    return sign | (floor + (roundUp ? 1 : 0));
  }
  const rounded = magnitude + 0xfff + ((magnitude >>> 13) & 1);
  return sign | ((rounded - 0x38000000) >>> 13);
}

/** The float32 that float16 `bits` stand for, exactly. */
export function float16BitsToFloat32(bits: number): number {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >>> 10) & 0x1f;
  const fraction = bits & 0x3ff;
  if (exponent === 0) return sign * fraction * 5.9604644775390625e-8;
  if (exponent === 31) return fraction === 0 ? sign * Number.POSITIVE_INFINITY : Number.NaN;
  return sign * 2 ** (exponent - 15) * (1 + fraction / 1024);
}

let table: Float32Array | undefined;

/** float16BitsToFloat32 of every 16-bit pattern (256 KiB, built on first use): for bulk conversion. */
export function float16Table(): Float32Array {
  if (table === undefined) {
    table = new Float32Array(65536);
    for (let bits = 0; bits < 65536; bits++) table[bits] = float16BitsToFloat32(bits);
  }
  return table;
}

/** `count` values from `start` on, rounded, to `target` from element `at` on. */
export function floatsToHalves(
  source: Float32Array,
  start: number,
  count: number,
  target: Uint16Array,
  at: number,
): void {
  for (let i = 0; i < count; i++) target[at + i] = float32ToFloat16Bits(source[start + i]!);
}

/** The first `count` float16 of `source`, little-endian at any alignment. */
export function halvesToFloats(source: Uint8Array, count: number, target: Float32Array): void {
  const values = float16Table();
  for (let i = 0; i < count; i++) target[i] = values[source[2 * i]! | (source[2 * i + 1]! << 8)]!;
}

/** The float32 that bfloat16 `bits` stand for, exactly. */
export function bfloat16BitsToFloat32(bits: number): number {
  u32[0] = bits << 16;
  return f32[0]!;
}
