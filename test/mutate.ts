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

/** Bytes that mean something to msgpack, JSON or a header. */
const TELLING = [
  0x00, 0x01, 0x7f, 0x80, 0x90, 0xc1, 0xc6, 0xc9, 0xd4, 0xd9, 0xdb, 0xdd, 0xde, 0xdf, 0xff, 0x22, 0x5b, 0x7b,
];

/** One to four changes of a seed: bits, bytes, cuts, insertions, 32-bit words, another seed's end. */
export function mutate(seeds: readonly Uint8Array[], random: (below: number) => number): Uint8Array {
  let bytes = Buffer.from(seeds[random(seeds.length)]!);
  for (let changes = 1 + random(4); changes > 0; changes--) {
    const at = random(bytes.length + 1);
    switch (random(7)) {
      case 0:
        if (at < bytes.length) bytes[at]! ^= 1 << random(8);
        break;
      case 1:
        if (at < bytes.length) bytes[at] = TELLING[random(TELLING.length)]!;
        break;
      case 2:
        bytes = bytes.subarray(0, at);
        break;
      case 3:
        bytes = Buffer.concat([bytes.subarray(0, at), Buffer.of(TELLING[random(TELLING.length)]!), bytes.subarray(at)]);
        break;
      case 4:
        if (at + 4 <= bytes.length)
          bytes.writeUInt32BE([0, 0x7fffffff, 0xffffffff, 0x10000, random(2 ** 31)][random(5)]!, at);
        break;
      case 5:
        bytes = Buffer.concat([bytes.subarray(0, at), bytes.subarray(random(bytes.length + 1))]);
        break;
      default: {
        const other = seeds[random(seeds.length)]!;
        bytes = Buffer.concat([bytes.subarray(0, at), other.subarray(random(other.length + 1))]);
      }
    }
  }
  return bytes;
}
