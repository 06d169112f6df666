/** Owns how fuzz tests change messages: seeded, so that a run can be repeated. */

/** A small generator of 32-bit numbers (mulberry32): the same cases in each run. */
export function randomOf(seed: number): (below: number) => number {
  let state = seed;
  return (below) => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) % below;
  };
}

/** Bytes that mean something to msgpack, msgpackr's extensions, JSON or a header. */
const TELLING = [
  0x00, 0x01, 0x7f, 0x80, 0x90, 0xc1, 0xc6, 0xc7, 0xc9, 0xd4, 0xd6, 0xd9, 0xdb, 0xdd, 0xde, 0xdf, 0xff, 0x22, 0x5b,
  0x70, 0x72, 0x7b,
];

/** What is being changed; a million messages would else be millions of buffers. */
let scratch = Buffer.alloc(64 * 1024);

/** One to four changes of a seed: bits, bytes, cuts, insertions, 32-bit words, another seed's end. */
export function mutate(seeds: readonly Uint8Array[], random: (below: number) => number): Uint8Array {
  const seed = seeds[random(seeds.length)]!;
  let length = replaceEnd(0, seed);
  for (let changes = 1 + random(4); changes > 0; changes--) {
    const at = random(length + 1);
    switch (random(7)) {
      case 0:
        if (at < length) scratch[at]! ^= 1 << random(8);
        break;
      case 1:
        if (at < length) scratch[at] = TELLING[random(TELLING.length)]!;
        break;
      case 2:
        length = at;
        break;
      case 3: {
        const end = scratch.subarray(at, length);
        const inserted = TELLING[random(TELLING.length)]!;
        length = replaceEnd(at + 1, end);
        scratch[at] = inserted;
        break;
      }
      case 4:
        if (at + 4 <= length)
          scratch.writeUInt32BE([0, 0x7fffffff, 0xffffffff, 0x10000, random(2 ** 31)][random(5)]!, at);
        break;
      case 5:
        length = replaceEnd(at, scratch.subarray(random(length + 1), length));
        break;
      default: {
        const other = seeds[random(seeds.length)]!;
        length = replaceEnd(at, other.subarray(random(other.length + 1)));
      }
    }
  }
  return Buffer.from(scratch.subarray(0, length));
}

/** Puts `bytes`, which may be of the scratch itself, behind its first `at`. Returns the length of all. */
function replaceEnd(at: number, bytes: Uint8Array): number {
  const length = at + bytes.length;
  if (length > scratch.length) {
    const larger = Buffer.alloc(2 * length);
    larger.set(scratch.subarray(0, at));
    larger.set(bytes, at);
    scratch = larger;
  } else scratch.set(bytes, at);
  return length;
}
