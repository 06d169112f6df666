/**
 * Owns one native connection to nats-server (native/addon.cc): a line at a time, from receive memory that is used again.
 *
 * Invariants
 * 1. The line that a callback sees is valid during that callback; a message that is to stay is held.
 * 2. `onEnd` is called once, after which nothing else is.
 */
import { loadNativeModule } from '@lamina/tensor';
import { ReceiveMemories, type ReceiveMemory } from './receive-memory.ts';

type NativeLinkHandle = { readonly __nativeLink: never };

interface LinkAddon {
  open(
    address: string,
    port: number,
    record: Int32Array,
    onLine: () => void,
    onMemory: (minBytes: number) => Uint8Array,
    onEnd: (reason: string) => void,
  ): NativeLinkHandle;
  publish(link: NativeLinkHandle, subject: string, reply: string, data: Uint8Array): void;
  write(link: NativeLinkHandle, bytes: Uint8Array): void;
  flush(link: NativeLinkHandle): void;
  wait(link: NativeLinkHandle, timeoutUs: number, spinUs: number): number;
  hold(link: NativeLinkHandle): void;
  attach(link: NativeLinkHandle, subscription: number, handler: object): void;
  detach(link: NativeLinkHandle, subscription: number): void;
  setMaxPayload(link: NativeLinkHandle, numBytes: number): void;
  close(link: NativeLinkHandle): void;
  takeCpuSeconds(isMeasured: boolean): number;
}

const loaded = loadNativeModule<LinkAddon>(new URL('../build/lamina_link.node', import.meta.url), [
  'open',
  'publish',
  'write',
  'flush',
  'wait',
  'hold',
  'attach',
  'detach',
  'setMaxPayload',
  'close',
  'takeCpuSeconds',
]);

/** Why there is no native link on this machine, or undefined. */
export const noNativeLinkReason: string | undefined = loaded.addon === null ? loaded.reason : undefined;

/**
 * CPU seconds of native code of links on this thread since the last call, and whether it is measured from now on: for profiles,
 * whose clock takes a thread that a system call has put off its core for a busy one. Undefined without native links.
 */
export function takeLinkCpuSeconds(isMeasured: boolean): number | undefined {
  return loaded.addon?.takeCpuSeconds(isMeasured);
}

/** Kinds of lines that are told of: LineKind of native/server_lines.h. */
export const LINE_KIND = { message: 1, info: 2, pong: 4, error: 6 } as const;

/** RecordField of native/addon.cc: places in the receive memory. */
const FIELD = {
  kind: 0,
  subscription: 1,
  text: 3,
  textEnd: 4,
  reply: 5,
  replyEnd: 6,
  headers: 7,
  payload: 8,
  end: 9,
} as const;
const NUM_FIELDS = 10;

export interface SocketEvents {
  /** Must not throw. */
  readonly onLine: () => void;
  readonly onEnd: (reason: string) => void;
}

export class NativeSocket {
  readonly #addon: LinkAddon;
  readonly #handle: NativeLinkHandle;
  readonly #record = new Int32Array(NUM_FIELDS);
  readonly #memories = new ReceiveMemories();

  /**
   * Begins to connect.
   * @param address Numeric.
   * @throws Error when that cannot even begin.
   */
  constructor(address: string, port: number, events: SocketEvents) {
    if (loaded.addon === null) throw new Error(loaded.reason);
    this.#addon = loaded.addon;
    const onMemory = (minBytes: number): Uint8Array => this.#memories.next(minBytes).bytes;
    this.#handle = this.#addon.open(address, port, this.#record, events.onLine, onMemory, events.onEnd);
  }

  /** Of the line that onLine is told of: one of LINE_KIND. */
  get kind(): number {
    return this.#record[FIELD.kind]!;
  }

  get subscription(): number {
    return this.#record[FIELD.subscription]! >>> 0;
  }

  /** Subject of a message, what follows INFO or -ERR. */
  get text(): string {
    return this.#memory.bytes.toString('latin1', this.#record[FIELD.text]!, this.#record[FIELD.textEnd]!);
  }

  /** '' when there is none. */
  get reply(): string {
    return this.#memory.bytes.toString('latin1', this.#record[FIELD.reply]!, this.#record[FIELD.replyEnd]!);
  }

  /** "NATS/1.0 ..." and what follows; '' when there are none. */
  get headers(): string {
    return this.#memory.bytes.toString('latin1', this.#record[FIELD.headers]!, this.#record[FIELD.payload]!);
  }

  get payload(): Uint8Array {
    const { bytes } = this.#memory;
    const start = this.#record[FIELD.payload]!;
    return new Uint8Array(bytes.buffer, bytes.byteOffset + start, this.#record[FIELD.end]! - start);
  }

  /** Keeps the payload of the line as it is until the memory is released. */
  hold(): ReceiveMemory {
    const memory = this.#memory;
    memory.hold();
    this.#addon.hold(this.#handle);
    return memory;
  }

  /** Messages of the subscription are handed to it first, and what it answers is published. */
  attach(subscription: number, handler: object): void {
    this.#addon.attach(this.#handle, subscription, handler);
  }

  detach(subscription: number): void {
    this.#addon.detach(this.#handle, subscription);
  }

  /** Of what handlers may answer. */
  set maxPayloadBytes(numBytes: number) {
    this.#addon.setMaxPayload(this.#handle, numBytes);
  }

  publish(subject: string, reply: string, data: Uint8Array): void {
    this.#addon.publish(this.#handle, subject, reply, data);
  }

  /** Lines of the protocol; sent at once. */
  write(lines: string): void {
    this.#addon.write(this.#handle, Buffer.from(lines));
  }

  flush(): void {
    this.#addon.flush(this.#handle);
  }

  /** Sends what was published and takes what comes within `timeoutUs`; does not sleep for the first `spinUs`. Returns how many messages came. */
  wait(timeoutUs: number, spinUs: number): number {
    return this.#addon.wait(this.#handle, timeoutUs, spinUs);
  }

  close(): void {
    this.#addon.close(this.#handle);
  }

  get #memory(): ReceiveMemory {
    return this.#memories.current!;
  }
}
