/**
 * Owns which msgpack is read: one pass over the bytes before anything is made of them.
 *
 * Invariants
 * 1. It takes time in proportion to the bytes whatever they are, recurses nowhere and allocates nothing.
 * 2. What passes is one whole value of numbers, texts, booleans, nil, arrays and maps with texts as keys. Extensions would
 *    refer to other values (a few bytes can say 2^40 of them), compile code or make errors with stacks; byte strings are in
 *    no message. `undefined`, which JavaScript's packers write for a field that is not set, is the one extension taken.
 * 3. What passes makes few objects: maps, arrays and entries of maps are counted, since an empty map is one byte here and
 *    56 in memory.
 */
import { LIMITS } from './limits.ts';

/** Bytes of a value by its first byte; 0 where more must be looked at. */
const SCALAR_BYTES = new Uint8Array(256);
SCALAR_BYTES.fill(1, 0x00, 0x80).fill(1, 0xe0);
for (const [token, bytes] of [
  [0xc0, 1], // nil
  [0xc2, 1], // false
  [0xc3, 1], // true
  [0xca, 5], // float 32
  [0xcb, 9], // float 64
  [0xcc, 2], // uint 8, 16, 32, 64
  [0xcd, 3],
  [0xce, 5],
  [0xcf, 9],
  [0xd0, 2], // int 8, 16, 32, 64
  [0xd1, 3],
  [0xd2, 5],
  [0xd3, 9],
] as const)
  SCALAR_BYTES[token] = bytes;

const FIXEXT_1 = 0xd4;
/** By custom, as fixext 1. */
const UNDEFINED_TYPE = 0;
const UNDEFINED_BYTES = 3;

const TRUNCATED = 'it ends in the middle of a value';

/** Of each container that is open: values that are still to come, keys of a map included, and whether it is a map. */
const numLeft = new Uint32Array(LIMITS.messageDepth + 1);
const isMap = new Uint8Array(LIMITS.messageDepth + 1);

/** Big-endian, of 1, 2 or 4 bytes. */
function readLength(bytes: Uint8Array, at: number, numBytes: number): number {
  let length = 0;
  for (let i = at; i < at + numBytes; i++) length = length * 256 + bytes[i]!;
  return length;
}

/**
 * What is wrong with a message, or undefined when it can be unpacked.
 * @param maxParts Arrays, maps and entries of maps.
 */
export function msgpackProblem(bytes: Uint8Array, maxParts: number): string | undefined {
  const end = bytes.length;
  let at = 0;
  let numParts = 0;
  let depth = 0;
  numLeft[0] = 1;
  isMap[0] = 0;
  for (;;) {
    while (numLeft[depth] === 0) {
      if (depth === 0) return at === end ? undefined : `it goes on after its value, at byte ${at}`;
      depth--;
    }
    if (at >= end) return TRUNCATED;
    const token = bytes[at]!;
    const isKey = isMap[depth] === 1 && numLeft[depth]! % 2 === 0;
    numLeft[depth]!--;
    if (SCALAR_BYTES[token]! > 0 && !isKey) {
      at += SCALAR_BYTES[token]!;
      if (at > end) return TRUNCATED;
      continue;
    }
    const isFixedText = token >= 0xa0 && token <= 0xbf;
    if (isFixedText || (token >= 0xd9 && token <= 0xdb)) {
      const lengthBytes = isFixedText ? 0 : 1 << (token - 0xd9);
      at += 1 + lengthBytes;
      if (at > end) return TRUNCATED;
      at += isFixedText ? token & 0x1f : readLength(bytes, at - lengthBytes, lengthBytes);
      if (at > end) return TRUNCATED;
      continue;
    }
    if (isKey) return `it has a map key that is no text, at byte ${at}`;
    const isFixedContainer = token >= 0x80 && token <= 0x9f;
    if (isFixedContainer || (token >= 0xdc && token <= 0xdf)) {
      const hasKeys = isFixedContainer ? token < 0x90 : token >= 0xde;
      const lengthBytes = isFixedContainer ? 0 : 2 << (token & 1);
      if (at + 1 + lengthBytes > end) return TRUNCATED;
      const length = isFixedContainer ? token & 0x0f : readLength(bytes, at + 1, lengthBytes);
      at += 1 + lengthBytes;
      const numValues = hasKeys ? 2 * length : length;
      if (numValues > end - at) return TRUNCATED;
      numParts += hasKeys ? 1 + length : 1;
      if (numParts > maxParts) return `it has more than ${maxParts} arrays, maps and entries of maps`;
      if (depth === LIMITS.messageDepth) return `it is nested deeper than ${LIMITS.messageDepth}`;
      depth++;
      numLeft[depth] = numValues;
      isMap[depth] = hasKeys ? 1 : 0;
      continue;
    }
    if (token === FIXEXT_1 && bytes[at + 1] === UNDEFINED_TYPE) {
      at += UNDEFINED_BYTES;
      if (at > end) return TRUNCATED;
      continue;
    }
    if (token >= 0xc4 && token <= 0xc6) return `it has a byte string, at byte ${at}; send text as a str`;
    return token === 0xc1 ? `it has the unused byte 0xc1, at byte ${at}` : `it has an extension type, at byte ${at}`;
  }
}
