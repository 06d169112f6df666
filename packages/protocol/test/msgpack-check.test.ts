/** Which msgpack is read: all that the specification calls plain, nothing that makes msgpackr do more than that. */
import { LaminaError } from '@lamina/tensor';
import fc from 'fast-check';
import { Packr } from 'msgpackr';
import { describe, expect, test } from 'vitest';
import { packMessage, unpackMessage } from '../src/codec.ts';
import { parseGenerateBody } from '../src/generate-request.ts';
import { LIMITS } from '../src/limits.ts';
import { msgpackProblem } from '../src/msgpack-check.ts';

const problemOf = (bytes: Uint8Array): string | undefined => msgpackProblem(bytes, LIMITS.messageParts);

function refusal(bytes: Uint8Array): string {
  try {
    return `taken: ${JSON.stringify(unpackMessage(bytes))}`;
  } catch (error) {
    if (!(error instanceof LaminaError)) throw error;
    return `${error.code}: ${error.message}`;
  }
}

/** CPU time of this process, whatever else the machine does. */
function cpuMsOf(run: () => unknown): number {
  const before = process.cpuUsage();
  run();
  const { user, system } = process.cpuUsage(before);
  return (user + system) / 1e3;
}

const u32 = (value: number): number[] => [value >>> 24, (value >>> 16) & 0xff, (value >>> 8) & 0xff, value & 0xff];

/** `{a: [[0, 0], [it, it], [it, it], ...]}`, each twice the one before: 2^depth zeros in a few bytes of each. */
function doubling(depth: number): Uint8Array {
  const bytes = [0x81, 0xa1, 0x61, 0xdc, 0, depth + 1];
  const pointer = (id: number): number[] => [0xd6, 0x70, ...u32(id)];
  for (let id = 0; id <= depth; id++)
    bytes.push(0xd6, 0x69, ...u32(id), 0x92, ...(id === 0 ? [0, 0] : [...pointer(id - 1), ...pointer(id - 1)]));
  return Uint8Array.from(bytes);
}

describe('what is refused', () => {
  test('references that make few bytes many values, at once', () => {
    const bytes = Buffer.concat([doubling(40), Buffer.of(0)]);
    expect(bytes.length).toBeLessThan(1_000);
    const cpuMs = cpuMsOf(() => {
      expect(refusal(bytes)).toMatch(/^protocol_violation: .*extension type, at byte 6$/);
      expect(() => parseGenerateBody(bytes)).toThrow(
        expect.objectContaining({
          code: 'invalid_request',
          message: 'the body is neither UTF-8 text nor a msgpack map: it has an extension type, at byte 6',
        }),
      );
    });
    expect(cpuMs).toBeLessThan(100);
  });

  test('every extension type in every form, but for undefined', () => {
    const heads = [[0xd4], [0xd5], [0xd6], [0xd7], [0xd8], [0xc7, 1], [0xc8, 0, 1], [0xc9, 0, 0, 0, 1]];
    const taken: string[] = [];
    for (const head of heads) {
      for (let type = 0; type < 256; type++) {
        const bytes = Uint8Array.from([0x81, 0xa1, 0x61, ...head, type, ...new Array(16).fill(0xa0)]);
        const whole = bytes.subarray(0, 3 + head.length + 1 + (head.length > 1 ? 1 : 1 << (head[0]! - 0xd4)));
        if (!refusal(whole).includes('an extension type')) taken.push(`${head} of type ${type}`);
      }
    }
    expect(taken).toEqual(['212 of type 0']);
    expect(unpackMessage(packMessage({ a: undefined }))).toEqual({ a: undefined });
  });

  test('what JavaScript packers write for objects of their own', () => {
    const packr = new Packr({ useRecords: false, moreTypes: true, useBigIntExtension: true });
    const values = [new Date(), new Error('x'), /x/, new Set([1]), new Float32Array(2), new ArrayBuffer(2), 2n ** 70n];
    expect(values.map((value) => refusal(packr.pack(value)))).toEqual(
      values.map(() => 'protocol_violation: a message is not valid msgpack: it has an extension type, at byte 0'),
    );
    expect(refusal(packMessage(Buffer.from('x')))).toContain('byte string');
    const shared = { a: 1 };
    expect(refusal(new Packr({ structuredClone: true, useRecords: false }).pack([shared, shared]))).toMatch(/^proto/);
    expect(refusal(new Packr().pack([shared]))).toMatch(/^proto/);
  });

  test.for([
    ['nothing', [], 'ends in the middle of a value'],
    ['half a number', [0xcd, 1], 'ends in the middle of a value'],
    ['half a length', [0xda, 1], 'ends in the middle of a value'],
    ['half a text', [0xa3, 0x61], 'ends in the middle of a value'],
    ['a text of 4 GB', [0xdb, 0xff, 0xff, 0xff, 0xff, 0x61], 'ends in the middle of a value'],
    ['an array of 4 G', [0xdd, 0xff, 0xff, 0xff, 0xff, 0], 'ends in the middle of a value'],
    ['a map of 4 G', [0xdf, 0xff, 0xff, 0xff, 0xff, 0xa0, 0], 'ends in the middle of a value'],
    ['a map without its last value', [0x81, 0xa1, 0x61], 'ends in the middle of a value'],
    ['half an undefined', [0xd4, 0], 'ends in the middle of a value'],
    ['two values', [1, 2], 'goes on after its value, at byte 1'],
    ['an array and more', [0x91, 1, 2], 'goes on after its value, at byte 2'],
    ['a byte string', [0xc4, 1, 0x61], 'has a byte string, at byte 0; send text as a str'],
    ['the unused byte', [0x91, 0xc1], 'has the unused byte 0xc1, at byte 1'],
    ['a number as key', [0x81, 5, 5], 'has a map key that is no text, at byte 1'],
    ['a map as key', [0x81, 0x80, 5], 'has a map key that is no text, at byte 1'],
    ['an undefined as key', [0x82, 0xa0, 0x80, 0xd4, 0, 0, 5], 'has a map key that is no text, at byte 3'],
  ] as const)('%s', ([, bytes, problem]) => {
    expect(refusal(Uint8Array.from(bytes))).toBe(`protocol_violation: a message is not valid msgpack: it ${problem}`);
  });

  test('nesting and parts beyond their bounds', () => {
    const nested = (depth: number): Uint8Array => Buffer.concat([Buffer.alloc(depth, 0x91), Buffer.of(0)]);
    expect(problemOf(nested(LIMITS.messageDepth))).toBeUndefined();
    expect(problemOf(nested(LIMITS.messageDepth + 1))).toBe('it is nested deeper than 32');
    expect(problemOf(Buffer.alloc(4_000_000, 0x91))).toBe('it is nested deeper than 32');
    const wide = Buffer.of(0x94, 0x80, 0x81, 0xa0, 0, 0x91, 0, 0x90);
    expect(msgpackProblem(wide, 6)).toBeUndefined();
    expect(msgpackProblem(wide, 5)).toBe('it has more than 5 arrays, maps and entries of maps');
  });
});

test('what passes is unpacked as it was packed', () => {
  const leaf = fc.oneof(
    fc.string(),
    fc.string({ unit: 'binary', minLength: 30, maxLength: 300 }),
    fc.maxSafeInteger(),
    fc.integer(),
    fc.double(),
    fc.boolean(),
    fc.constant(null),
  );
  const { value } = fc.letrec((tie) => ({
    value: fc.oneof(
      { maxDepth: 4, depthSize: 'small' },
      leaf,
      fc.array(tie('value')),
      fc.dictionary(fc.string(), tie('value')),
    ),
  }));
  fc.assert(
    fc.property(value, (packed) => {
      const bytes = packMessage(packed);
      expect(unpackMessage(bytes)).toEqual(new Packr({ useRecords: false, mapsAsObjects: true }).unpack(bytes));
      // Nothing of a whole value is one.
      const ends = Array.from({ length: Math.min(bytes.length, 40) }, (_, end) => end);
      expect(ends.filter((end) => problemOf(bytes.subarray(0, end)) === undefined)).toEqual([]);
    }),
    { numRuns: 200 },
  );
});

test('whatever passes can be unpacked', () => {
  const odd = fc.constantFrom(
    0x80,
    0x81,
    0x90,
    0x91,
    0x92,
    0xa0,
    0xa1,
    0xa2,
    0xc0,
    0xcb,
    0xd4,
    0xd9,
    0xdc,
    0xde,
    0,
    1,
    0xff,
  );
  let numPassed = 0;
  fc.assert(
    fc.property(fc.array(fc.oneof(odd, fc.nat(255)), { minLength: 1, maxLength: 24 }), (list) => {
      const bytes = Uint8Array.from(list);
      if (problemOf(bytes) !== undefined) return;
      numPassed++;
      unpackMessage(bytes);
    }),
    { numRuns: 30_000 },
  );
  expect(numPassed).toBeGreaterThan(300);
});

describe('4 MiB of nonsense cost milliseconds', () => {
  const array = (pattern: readonly number[], perPattern = 1): Buffer => {
    const numPatterns = Math.floor((LIMITS.generateBodyBytes - 8) / pattern.length);
    const head = [0x81, 0xa1, 0x61, 0xdd, ...u32(numPatterns * perPattern)];
    return Buffer.concat([Buffer.from(head), Buffer.alloc(numPatterns * pattern.length, Buffer.from(pattern))]);
  };
  test.for([
    ['empty maps', [0x80], 1],
    ['empty arrays', [0x90], 1],
    ['small maps', [0x81, 0xa0, 0xc0], 1],
    ['byte strings', [0xc4, 0], 1],
    ['errors', [0xd4, 0x65, 0, 0x90], 1],
    ['texts and maps', [0xa1, 0x61, 0x80], 2],
  ] as const)('%s', ([, pattern, perPattern]) => {
    const body = array(pattern, perPattern);
    expect(cpuMsOf(() => expect(() => parseGenerateBody(body)).toThrow(LaminaError))).toBeLessThan(300);
  });
});
