/**
 * Owns the frame of the tensor plane: a fixed little-endian header before raw bytes.
 *
 *   offset 0 u32 magic "LAM1"    4 u8 version   5 u8 kind, top bit: the checksum covers the body   6 u16 layer
 *          8 u32 stepId         12 u16 waveIndex                14 u16 shardIndex
 *         16 u32 bodyBytes (of the whole message)               20 u32 partOffset (of this frame's bytes in the body)
 *         24 u32 originId                                       28 u32 checksum of the header (and body)
 *
 * Invariants
 * 1. A message larger than the server's max_payload travels as several frames, in order, each with the whole header.
 * 2. (originId, waveIndex, stepId, layer) names one exchange; a shard echoes all four and shardIndex in its reply.
 * 3. A header is read into one reused record; what it costs is one short-lived DataView.
 * 4. The checksum always covers the header, so that a damaged one never mixes steps, and the body of plans and failures,
 *    which say where KV is written. That of tensors it covers if the executor asks for it: TCP has a checksum of its own.
 */
import { crc32 } from 'node:zlib';
import { LaminaError } from '@lamina/tensor';
import { LIMITS } from './limits.ts';

export const FRAME_HEADER_BYTES = 32;
const MAGIC = 0x314d414c;
const VERSION = 3;
const CHECKSUM_OFFSET = 28;
const COVERS_BODY = 0x80;

/** plan: executor -> shard, once per step. attend: executor -> shard, q k v of one layer. partial, failure: shard -> executor. */
export const FRAME_KIND = { plan: 1, attend: 2, partial: 3, failure: 4 } as const;
export type FrameKind = (typeof FRAME_KIND)[keyof typeof FRAME_KIND];

export interface FrameHeader {
  kind: number;
  layer: number;
  stepId: number;
  waveIndex: number;
  shardIndex: number;
  /** Bytes of the whole body, all parts together, headers not counted. */
  bodyBytes: number;
  /** Where this frame's bytes belong in the body. */
  partOffset: number;
  /** Random id of the worker thread that runs the step. */
  originId: number;
  /** The checksum covers the tensors of this frame as well. */
  isBodyChecked: boolean;
}

export function emptyFrameHeader(): FrameHeader {
  return {
    kind: 0,
    layer: 0,
    stepId: 0,
    waveIndex: 0,
    shardIndex: 0,
    bodyBytes: 0,
    partOffset: 0,
    originId: 0,
    isBodyChecked: false,
  };
}

/** A multiplicative hash of the words before the checksum: 20 ns, where a call of crc32 for so little takes ten times that. */
function headerChecksum(view: DataView): number {
  let sum = 0x9e3779b9;
  for (let at = 0; at < CHECKSUM_OFFSET; at += 4)
    sum = Math.imul(sum ^ view.getInt32(at, true), 0x85ebca6b) ^ (sum >>> 13);
  return (sum ^ (sum >>> 16)) >>> 0;
}

function checksumOf(frame: Uint8Array, view: DataView, coversBody: boolean): number {
  const sum = headerChecksum(view);
  return coversBody ? crc32(frame.subarray(FRAME_HEADER_BYTES), sum) : sum;
}

const alwaysCoversBody = (kind: number): boolean => kind === FRAME_KIND.plan || kind === FRAME_KIND.failure;

/** Writes `header` at the start of `buffer`, which is the whole frame: its body must be there already. */
export function writeFrameHeader(buffer: Uint8Array, header: FrameHeader): void {
  const view = new DataView(buffer.buffer, buffer.byteOffset, FRAME_HEADER_BYTES);
  view.setUint32(0, MAGIC, true);
  view.setUint8(4, VERSION);
  const coversBody = header.isBodyChecked || alwaysCoversBody(header.kind);
  view.setUint8(5, coversBody ? header.kind | COVERS_BODY : header.kind);
  view.setUint16(6, header.layer, true);
  view.setUint32(8, header.stepId, true);
  view.setUint16(12, header.waveIndex, true);
  view.setUint16(14, header.shardIndex, true);
  view.setUint32(16, header.bodyBytes, true);
  view.setUint32(20, header.partOffset, true);
  view.setUint32(24, header.originId, true);
  view.setUint32(CHECKSUM_OFFSET, checksumOf(buffer, view, coversBody), true);
}

/**
 * Reads and checks the header of a frame into `header`.
 * @throws LaminaError `protocol_violation` when the frame is short, of another version or inconsistent; then `header.kind` is
 * 0. `unavailable` when it was damaged on its way: `header` then says where it seems to belong.
 */
export function readFrameHeader(frame: Uint8Array, header: FrameHeader): void {
  header.kind = 0;
  if (frame.length < FRAME_HEADER_BYTES) throw badFrame('shorter than its header', frame);
  const view = new DataView(frame.buffer, frame.byteOffset, FRAME_HEADER_BYTES);
  if (view.getUint32(0, true) !== MAGIC) throw badFrame('not a Lamina frame', frame);
  if (view.getUint8(4) !== VERSION)
    throw badFrame(`version ${view.getUint8(4)}, this process speaks ${VERSION}`, frame);
  const kind = view.getUint8(5) & ~COVERS_BODY;
  const coversBody = (view.getUint8(5) & COVERS_BODY) !== 0;
  header.layer = view.getUint16(6, true);
  header.stepId = view.getUint32(8, true);
  header.waveIndex = view.getUint16(12, true);
  header.shardIndex = view.getUint16(14, true);
  header.bodyBytes = view.getUint32(16, true);
  header.partOffset = view.getUint32(20, true);
  header.originId = view.getUint32(24, true);
  header.isBodyChecked = coversBody;
  if (kind < FRAME_KIND.plan || kind > FRAME_KIND.failure) throw badFrame(`kind ${kind} is unknown`, frame);
  if (header.bodyBytes > LIMITS.tensorBytes)
    throw badFrame(`a body of ${header.bodyBytes} bytes is over the limit`, frame);
  if (header.partOffset + frame.length - FRAME_HEADER_BYTES > header.bodyBytes)
    throw badFrame('more bytes than its body has', frame);
  if (alwaysCoversBody(kind) && !coversBody) throw badFrame(`kind ${kind} without a checksum of its body`, frame);
  header.kind = kind;
  if (view.getUint32(CHECKSUM_OFFSET, true) !== checksumOf(frame, view, coversBody))
    throw new LaminaError('unavailable', 'a tensor frame was damaged on its way', {
      diagnostics: { frameBytes: frame.length },
    });
}

function badFrame(what: string, frame: Uint8Array): LaminaError {
  return new LaminaError('protocol_violation', `bad tensor frame: ${what}`, {
    diagnostics: { frameBytes: frame.length },
  });
}

/**
 * The frames of a message (header + body in one buffer): the buffer itself when it fits `maxPayloadBytes`, else copies.
 * Hot path callers test the length first and never get here for one-frame messages.
 * @throws LaminaError `config_invalid` when a header alone does not fit.
 */
export function splitFrame(message: Uint8Array, header: FrameHeader, maxPayloadBytes: number): Uint8Array[] {
  if (message.length <= maxPayloadBytes) return [message];
  const partBytes = maxPayloadBytes - FRAME_HEADER_BYTES;
  if (partBytes < 1) {
    throw new LaminaError('config_invalid', `max_payload of nats-server is ${maxPayloadBytes}; tensors need far more`);
  }
  const frames: Uint8Array[] = [];
  for (let offset = 0; offset < header.bodyBytes; offset += partBytes) {
    const bytes = Math.min(partBytes, header.bodyBytes - offset);
    const frame = new Uint8Array(FRAME_HEADER_BYTES + bytes);
    frame.set(message.subarray(FRAME_HEADER_BYTES + offset, FRAME_HEADER_BYTES + offset + bytes), FRAME_HEADER_BYTES);
    writeFrameHeader(frame, { ...header, partOffset: offset });
    frames.push(frame);
  }
  return frames;
}

/**
 * Joins the parts of one body. NATS keeps the order of one publisher, so parts arrive in order; a repeated part is
 * ignored and a gap is an error. The memory is reused from message to message, and grows with what has arrived: what
 * a header promises reserves nothing.
 */
export class FrameAssembler {
  #body = new Uint8Array(0);
  #receivedBytes = 0;
  #bodyBytes = -1;
  #key = '';

  /**
   * Takes one frame. Returns the whole body when it is complete, else undefined. A body that came in one frame is a
   * view of `frame` (no copy); a joined one is a view of the assembler's memory, valid until the next call.
   * @throws LaminaError `protocol_violation` on a gap or on parts that disagree.
   */
  push(frame: Uint8Array, header: FrameHeader): Uint8Array | undefined {
    const bytes = frame.length - FRAME_HEADER_BYTES;
    if (bytes === header.bodyBytes) return frame.subarray(FRAME_HEADER_BYTES);
    if (bytes === 0) return undefined;
    const { kind, originId, waveIndex, shardIndex, stepId, layer } = header;
    const key = `${kind}.${originId}.${waveIndex}.${shardIndex}.${stepId}.${layer}`;
    const isSame = key === this.#key && header.bodyBytes === this.#bodyBytes;
    const isIncomplete = this.#receivedBytes < this.#bodyBytes;
    if (header.partOffset === 0 && !(isSame && isIncomplete)) {
      this.#key = key;
      this.#bodyBytes = header.bodyBytes;
      this.#receivedBytes = 0;
    } else if (!isSame || header.partOffset > this.#receivedBytes) {
      throw badFrame(
        `part at ${header.partOffset} does not follow ${this.#receivedBytes} bytes of the same message`,
        frame,
      );
    }
    const end = header.partOffset + bytes;
    if (end <= this.#receivedBytes) return undefined;
    this.#reserve(end);
    this.#body.set(frame.subarray(FRAME_HEADER_BYTES), header.partOffset);
    this.#receivedBytes = end;
    return end === this.#bodyBytes ? this.#body.subarray(0, end) : undefined;
  }

  #reserve(bytes: number): void {
    if (this.#body.length >= bytes) return;
    const body = new Uint8Array(Math.min(this.#bodyBytes, 2 * bytes));
    body.set(this.#body.subarray(0, this.#receivedBytes));
    this.#body = body;
  }
}
