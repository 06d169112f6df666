/** Frames of the tensor plane: written, split, sent, read, joined. */
import { expect, test } from 'vitest';
import {
  emptyFrameHeader,
  FRAME_HEADER_BYTES,
  FRAME_KIND,
  FrameAssembler,
  type FrameHeader,
  readFrameHeader,
  splitFrame,
  writeFrameHeader,
} from '../src/frame.ts';
import { LIMITS } from '../src/limits.ts';

const HEADER: FrameHeader = {
  kind: FRAME_KIND.partial,
  layer: 0xfffe,
  stepId: 0xfffffffd,
  waveIndex: 0xfffc,
  shardIndex: 0xfffb,
  bodyBytes: 0,
  partOffset: 0,
  originId: 0xfffffffa,
  isBodyChecked: false,
};

function messageOf(bodyBytes: number, header: Partial<FrameHeader> = {}): { message: Uint8Array; header: FrameHeader } {
  const message = new Uint8Array(FRAME_HEADER_BYTES + bodyBytes);
  for (let i = 0; i < bodyBytes; i++) message[FRAME_HEADER_BYTES + i] = (i * 31 + bodyBytes) % 251;
  const whole = { ...HEADER, ...header, bodyBytes };
  writeFrameHeader(message, whole);
  return { message, header: whole };
}

/** As NATS delivers it: a Buffer that is a view at an odd offset into a chunk full of other bytes. */
function delivered(frame: Uint8Array, offset = 7): Buffer {
  const chunk = Buffer.alloc(offset + frame.length + 5, 0xaa);
  chunk.set(frame, offset);
  return chunk.subarray(offset, offset + frame.length);
}

function push(assembler: FrameAssembler, frame: Uint8Array): Buffer | undefined {
  const header = emptyFrameHeader();
  readFrameHeader(frame, header);
  const body = assembler.push(frame, header);
  return body === undefined ? undefined : Buffer.from(body);
}

const VIOLATION = expect.objectContaining({ code: 'protocol_violation' });

test('a header is read as it was written, at the documented offsets', () => {
  const header = { ...HEADER, kind: 2, layer: 0x0102, stepId: 0x03040506, waveIndex: 0x0708, shardIndex: 0x090a };
  const frame = new Uint8Array(FRAME_HEADER_BYTES + 0x10).fill(0xff);
  writeFrameHeader(frame, { ...header, bodyBytes: 0x00020110, partOffset: 0x00020100, originId: 0x0b0c0d0e });
  expect(Buffer.from(frame.subarray(0, FRAME_HEADER_BYTES)).toString('hex')).toBe(
    '4c414d31' +
      '03' +
      '02' +
      '0201' +
      '06050403' +
      '0807' +
      '0a09' +
      '10010200' +
      '00010200' +
      '0e0d0c0b' +
      '4cf78d53',
  );
  expect(frame.subarray(FRAME_HEADER_BYTES).every((byte) => byte === 0xff)).toBe(true);
  const read = emptyFrameHeader();
  readFrameHeader(delivered(frame), read);
  expect(read).toEqual({ ...header, bodyBytes: 0x00020110, partOffset: 0x00020100, originId: 0x0b0c0d0e });
  const inside = delivered(new Uint8Array(FRAME_HEADER_BYTES), 3);
  writeFrameHeader(inside, HEADER);
  readFrameHeader(inside, read);
  expect(read).toEqual(HEADER);
});

test('a message of any size crosses any max_payload, and each frame fits', () => {
  const problems: string[] = [];
  const assembler = new FrameAssembler();
  for (const bodyBytes of [0, 1, 2, 15, 16, 17, 255, 256, 1000, 4096, 65_537]) {
    for (const maxPayload of [33, 34, 48, 64, 288, 1024, 65_536 + 32, 65_537 + 32, 1_048_576]) {
      if (bodyBytes / (maxPayload - FRAME_HEADER_BYTES) > 20_000) continue;
      const { message, header } = messageOf(bodyBytes);
      const frames = splitFrame(message, header, maxPayload);
      const name = `${bodyBytes} bytes by ${maxPayload}`;
      if (frames.length !== Math.max(1, Math.ceil(bodyBytes / (maxPayload - FRAME_HEADER_BYTES))))
        problems.push(`${name}: ${frames.length} frames`);
      if (message.length <= maxPayload && frames[0] !== message) problems.push(`${name}: was copied`);
      if (frames.some((frame) => frame.length > maxPayload)) problems.push(`${name}: a frame does not fit`);
      const bodies = frames.map((frame, i) => push(assembler, delivered(frame, i % 9)));
      const whole = bodies.pop();
      if (bodies.some((body) => body !== undefined)) problems.push(`${name}: complete too early`);
      if (whole?.equals(message.subarray(FRAME_HEADER_BYTES)) !== true) problems.push(`${name}: came out different`);
    }
  }
  expect(problems).toEqual([]);
});

test.each([0, 31, 32])('a max_payload of %i, where no byte fits behind a header, is refused', (maxPayload) => {
  const { message, header } = messageOf(10);
  expect(() => splitFrame(message, header, maxPayload)).toThrow(expect.objectContaining({ code: 'config_invalid' }));
});

test('a body that comes in one frame is not copied', () => {
  const { message, header } = messageOf(100);
  const frame = delivered(message);
  const body = new FrameAssembler().push(frame, header);
  expect([body?.buffer, body?.byteOffset]).toEqual([frame.buffer, frame.byteOffset + FRAME_HEADER_BYTES]);
});

test('a repeated part is ignored wherever it comes, the first and the last one too', () => {
  const { message, header } = messageOf(100);
  const frames = splitFrame(message, header, FRAME_HEADER_BYTES + 30).map((frame) => delivered(frame));
  expect(frames).toHaveLength(4);
  const assembler = new FrameAssembler();
  const complete = [0, 0, 1, 0, 1, 2, 2, 0, 3, 3, 2, 1].map((part) => push(assembler, frames[part]!) !== undefined);
  expect(complete.map((isComplete, i) => (isComplete ? i : -1)).filter((i) => i >= 0)).toEqual([8]);
  // The next message of the same name, as another layer cycle would send it, is whole again.
  expect(frames.map((frame) => push(assembler, frame)).pop()).toEqual(Buffer.from(message.subarray(32)));
});

test('a part without a byte changes nothing', () => {
  const { message, header } = messageOf(60);
  const frames = splitFrame(message, header, FRAME_HEADER_BYTES + 30);
  const empty = (partOffset: number): Uint8Array => {
    const frame = new Uint8Array(FRAME_HEADER_BYTES);
    writeFrameHeader(frame, { ...header, partOffset });
    return frame;
  };
  const assembler = new FrameAssembler();
  const order = [empty(0), frames[0]!, empty(0), empty(30), empty(60), frames[1]!, empty(60)];
  expect(order.map((frame) => push(assembler, frame)?.length)).toEqual([
    undefined,
    undefined,
    undefined,
    undefined,
    undefined,
    60,
    undefined,
  ]);
});

test('a gap is an error, and the message can still be completed', () => {
  const { message, header } = messageOf(100);
  const frames = splitFrame(message, header, FRAME_HEADER_BYTES + 30);
  const assembler = new FrameAssembler();
  expect(() => push(assembler, frames[1]!)).toThrow(VIOLATION);
  push(assembler, frames[0]!);
  expect(() => push(assembler, frames[2]!)).toThrow(VIOLATION);
  push(assembler, frames[1]!);
  push(assembler, frames[2]!);
  expect(push(assembler, frames[3]!)).toEqual(Buffer.from(message.subarray(32)));
});

test.each(['kind', 'layer', 'stepId', 'waveIndex', 'shardIndex', 'originId'] as const)(
  'parts of two messages that differ in %s are not joined',
  (field) => {
    const first = messageOf(100, { [field]: 1 });
    const other = messageOf(100, { [field]: 2 });
    const split = ({ message, header }: typeof first): Uint8Array[] =>
      splitFrame(message, header, FRAME_HEADER_BYTES + 60);
    const assembler = new FrameAssembler();
    push(assembler, split(first)[0]!);
    expect(() => push(assembler, split(other)[1]!)).toThrow(VIOLATION);
    // The first part of another message drops what was there.
    expect(push(assembler, split(other)[0]!)).toBeUndefined();
    expect(() => push(assembler, split(first)[1]!)).toThrow(VIOLATION);
    expect(push(assembler, split(other)[1]!)?.length).toBe(100);
  },
);

test('parts that disagree about the size of their body are not joined', () => {
  const short = messageOf(90);
  const long = messageOf(100);
  const assembler = new FrameAssembler();
  push(assembler, splitFrame(long.message, long.header, FRAME_HEADER_BYTES + 60)[0]!);
  expect(() => push(assembler, splitFrame(short.message, short.header, FRAME_HEADER_BYTES + 60)[1]!)).toThrow(
    VIOLATION,
  );
});

test('what a header promises takes no memory before it comes', () => {
  const before = process.memoryUsage().arrayBuffers;
  const assemblers = Array.from({ length: 16 }, () => {
    const frame = new Uint8Array(FRAME_HEADER_BYTES + 1);
    writeFrameHeader(frame, { ...HEADER, bodyBytes: LIMITS.tensorBytes });
    const assembler = new FrameAssembler();
    push(assembler, frame);
    return assembler;
  });
  expect(process.memoryUsage().arrayBuffers - before).toBeLessThan(1_000_000);
  expect(assemblers).toHaveLength(16);
});

test('a frame that is short, foreign, of another version, of no kind or too long is refused', () => {
  const { message } = messageOf(10);
  const altered = (change: (view: DataView) => void): Buffer => {
    const frame = delivered(message);
    change(new DataView(frame.buffer, frame.byteOffset, frame.length));
    return frame;
  };
  const bad: Record<string, Uint8Array> = {
    empty: new Uint8Array(0),
    short: message.subarray(0, FRAME_HEADER_BYTES - 1),
    magic: altered((view) => view.setUint8(3, 0x32)),
    version: altered((view) => view.setUint8(4, 1)),
    'kind 0': altered((view) => view.setUint8(5, 0)),
    'kind 5': altered((view) => view.setUint8(5, 5)),
    'body over the limit': altered((view) => view.setUint32(16, LIMITS.tensorBytes + 1, true)),
    'more than its body': altered((view) => view.setUint32(16, 9, true)),
    'a part beyond its body': altered((view) => view.setUint32(20, 1, true)),
    'a part far beyond': altered((view) => view.setUint32(20, 0xffffffff, true)),
  };
  const refused = Object.entries(bad).map(([name, frame]) => {
    try {
      readFrameHeader(frame, emptyFrameHeader());
      return `${name}: taken`;
    } catch (error) {
      return `${name}: ${Object(error).code}`;
    }
  });
  expect(refused).toEqual(Object.keys(bad).map((name) => `${name}: protocol_violation`));
  const atTheLimit = new Uint8Array(FRAME_HEADER_BYTES);
  writeFrameHeader(atTheLimit, { ...HEADER, bodyBytes: LIMITS.tensorBytes });
  expect(() => readFrameHeader(atTheLimit, emptyFrameHeader())).not.toThrow();
});

test('one changed bit is noticed: of the header always, of the body in plans, failures and where it is asked for', () => {
  const read = emptyFrameHeader();
  const damaged = (header: Partial<FrameHeader>, from: number, to: number): string[] => {
    const { message } = messageOf(24, header);
    const outcomes = new Set<string>();
    for (let bit = 8 * from; bit < 8 * to; bit++) {
      const frame = delivered(message);
      frame[bit >> 3]! ^= 1 << (bit & 7);
      try {
        readFrameHeader(frame, read);
        outcomes.add('taken');
      } catch (error) {
        outcomes.add(Object(error).code);
      }
    }
    return [...outcomes].sort();
  };
  const end = FRAME_HEADER_BYTES + 24;
  for (const kind of Object.values(FRAME_KIND)) {
    expect(damaged({ kind }, 0, FRAME_HEADER_BYTES), `header of kind ${kind}`).not.toContain('taken');
    expect(damaged({ kind, isBodyChecked: true }, 0, end), `kind ${kind}`).not.toContain('taken');
    const coversBody = kind === FRAME_KIND.plan || kind === FRAME_KIND.failure;
    expect(damaged({ kind }, FRAME_HEADER_BYTES, end)).toEqual([coversBody ? 'unavailable' : 'taken']);
  }
  // Parts of a message that came split have each their own.
  const { message, header } = messageOf(100, { kind: FRAME_KIND.plan });
  for (const part of splitFrame(message, header, FRAME_HEADER_BYTES + 30)) {
    readFrameHeader(part, read);
    part[part.length - 1]! ^= 1;
    expect(() => readFrameHeader(part, read)).toThrow(expect.objectContaining({ code: 'unavailable' }));
  }
});
