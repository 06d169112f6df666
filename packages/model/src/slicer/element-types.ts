/**
 * Owns ONNX's element types: their sizes, and reading the elements of a tensor as numbers.
 *
 * Invariants
 * 1. Numbers are exact, except of 64-bit integers beyond 2^53, which only the ends of slices have.
 */
import { bfloat16BitsToFloat32, float16BitsToFloat32, float32ToFloat16Bits } from '@lamina/tensor';
import { DATA_TYPE, integerOf, type OnnxTensor } from '../onnx.ts';

/** Numbers of the types that this module looks into; others are only passed on. */
export const TYPE = {
  float: DATA_TYPE.FLOAT,
  uint8: DATA_TYPE.UINT8,
  int8: DATA_TYPE.INT8,
  uint16: DATA_TYPE.UINT16,
  int16: DATA_TYPE.INT16,
  int32: DATA_TYPE.INT32,
  int64: DATA_TYPE.INT64,
  bool: DATA_TYPE.BOOL,
  float16: DATA_TYPE.FLOAT16,
  double: DATA_TYPE.DOUBLE,
  uint32: DATA_TYPE.UINT32,
  uint64: DATA_TYPE.UINT64,
  bfloat16: DATA_TYPE.BFLOAT16,
} as const;

const BITS: Readonly<Record<number, number>> = {
  [TYPE.float]: 32,
  [TYPE.uint8]: 8,
  [TYPE.int8]: 8,
  [TYPE.uint16]: 16,
  [TYPE.int16]: 16,
  [TYPE.int32]: 32,
  [TYPE.int64]: 64,
  [TYPE.bool]: 8,
  [TYPE.float16]: 16,
  [TYPE.double]: 64,
  [TYPE.uint32]: 32,
  [TYPE.uint64]: 64,
  [TYPE.bfloat16]: 16,
  // FLOAT8E4M3FN, FLOAT8E4M3FNUZ, FLOAT8E5M2, FLOAT8E5M2FNUZ, UINT4, INT4: newer than the schema in use.
  17: 8,
  18: 8,
  19: 8,
  20: 8,
  21: 4,
  22: 4,
};

/** Bytes of so many elements; undefined for a type that is not known. */
export function bytesOfElements(dataType: number, elements: number): number | undefined {
  const bits = BITS[dataType];
  return bits === undefined ? undefined : Math.ceil((elements * bits) / 8);
}

export function isFloating(dataType: number): boolean {
  return dataType === TYPE.float || dataType === TYPE.float16 || dataType === TYPE.bfloat16 || dataType === TYPE.double;
}

/** The data of a decoded tensor as its raw little-endian bytes, whichever of its fields it is in. */
export function inlineBytes(proto: OnnxTensor, dataType: number): Uint8Array {
  if (proto.rawData !== null && proto.rawData !== undefined && proto.rawData.byteLength > 0) return proto.rawData;
  const floats = proto.floatData ?? [];
  const doubles = proto.doubleData ?? [];
  const longs = [...(proto.int64Data ?? []), ...(proto.uint64Data ?? [])].map(integerOf);
  // Booleans, small integers and float16 bits are kept as int32.
  const ints = proto.int32Data ?? [];
  if (floats.length > 0) return new Uint8Array(Float32Array.from(floats).buffer);
  if (doubles.length > 0) return new Uint8Array(Float64Array.from(doubles).buffer);
  if (longs.length > 0) {
    return dataType === TYPE.uint32
      ? new Uint8Array(Uint32Array.from(longs).buffer)
      : new Uint8Array(BigInt64Array.from(longs, (value) => BigInt(clampToInt64(value))).buffer);
  }
  const bits = BITS[dataType] ?? 0;
  if (bits === 32) return new Uint8Array(Int32Array.from(ints).buffer);
  if (bits === 16) return new Uint8Array(Uint16Array.from(ints).buffer);
  return Uint8Array.from(ints);
}

/** The elements as numbers; null for a type that has none here. */
export function elementsOf(dataType: number, bytes: Uint8Array): Float64Array | null {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const read = READERS[dataType];
  const bits = BITS[dataType];
  if (read === undefined || bits === undefined) return null;
  const size = bits / 8;
  return Float64Array.from({ length: bytes.byteLength / size }, (_, i) => read(view, i * size));
}

const READERS: Readonly<Record<number, (view: DataView, at: number) => number>> = {
  [TYPE.float]: (view, at) => view.getFloat32(at, true),
  [TYPE.uint8]: (view, at) => view.getUint8(at),
  [TYPE.int8]: (view, at) => view.getInt8(at),
  [TYPE.uint16]: (view, at) => view.getUint16(at, true),
  [TYPE.int16]: (view, at) => view.getInt16(at, true),
  [TYPE.int32]: (view, at) => view.getInt32(at, true),
  [TYPE.int64]: (view, at) => Number(view.getBigInt64(at, true)),
  [TYPE.bool]: (view, at) => view.getUint8(at),
  [TYPE.float16]: (view, at) => float16BitsToFloat32(view.getUint16(at, true)),
  [TYPE.double]: (view, at) => view.getFloat64(at, true),
  [TYPE.uint32]: (view, at) => view.getUint32(at, true),
  [TYPE.uint64]: (view, at) => Number(view.getBigUint64(at, true)),
  [TYPE.bfloat16]: (view, at) => bfloat16BitsToFloat32(view.getUint16(at, true)),
};

/** The raw bytes of numbers in a type that constants have. */
export function bytesOfNumbers(dataType: number, values: ArrayLike<number>): Uint8Array {
  if (dataType === TYPE.int64) {
    return new Uint8Array(BigInt64Array.from(Array.from(values), (value) => BigInt(clampToInt64(value))).buffer);
  }
  if (dataType === TYPE.int32) return new Uint8Array(Int32Array.from(values).buffer);
  if (dataType === TYPE.bool) return Uint8Array.from(values);
  if (dataType === TYPE.float) return new Uint8Array(Float32Array.from(values).buffer);
  if (dataType === TYPE.double) return new Uint8Array(Float64Array.from(values).buffer);
  if (dataType === TYPE.float16) return new Uint8Array(Uint16Array.from(values, float32ToFloat16Bits).buffer);
  throw new TypeError(`no constants of type ${dataType}`);
}

/** 2^63 as a double is one too many. */
function clampToInt64(value: number): number {
  return Math.max(-(2 ** 63), Math.min(value, 2 ** 63 - 1024));
}
