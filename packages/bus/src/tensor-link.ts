/** Owns what a connection that tensors travel on can do, whichever kind it is. */
import type { Subscription } from './bus.ts';

/** One received message. It is valid during the callback only, its data longer if it is held. */
export interface LinkMessage {
  readonly subject: string;
  /** At any byte alignment. Empty when the server says that nobody listens where this would have been the answer. */
  readonly data: Uint8Array;
  /** Subject to answer to, or undefined. */
  readonly reply: string | undefined;
  /** Keeps `data` unchanged until it is released. Without it, it stays anyway. */
  hold?(): HeldMemory;
}

export interface HeldMemory {
  release(): void;
}

export type LinkStatus = 'disconnect' | 'reconnect';

export interface TensorLink {
  readonly kind: 'native' | 'nats';
  /** Largest message that the server takes. */
  readonly maxPayloadBytes: number;
  readonly isClosed: boolean;
  /** Sends at the end of this turn of the event loop, or with `receive`. Without a connection it is lost. */
  publish(subject: string, data: Uint8Array, reply?: string): void;
  /**
   * The callback runs as messages arrive, in order.
   * @param handler A native frame handler (packages/tensor/native/frame_handler.h), which a native link asks first: the callback
   * sees what that leaves.
   */
  subscribe(subject: string, callback: (message: LinkMessage) => void, handler?: object): Subscription;
  /**
   * Sends what was published, and blocks until something comes or `timeoutUs` are over; what comes is handed to its
   * callbacks before this returns. False at once where that is not possible.
   * @param spinUs For so long it does not sleep: who sleeps is woken late, and finds the caches cold.
   */
  receive(timeoutUs: number, spinUs: number): boolean;
  onStatus(callback: (status: LinkStatus) => void): void;
  /** Resolves when what was published is on the server, rejects when the connection is, or was meanwhile, cut. */
  flush(): Promise<void>;
  /** Sends what was published and closes, for good. Returns whether all was sent. */
  close(): Promise<boolean>;
}
