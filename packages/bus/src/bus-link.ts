/** Owns the tensor link over nats.js, which never writes to a received chunk again: for where there is no native one. */
import { Bus, type Subscription } from './bus.ts';
import type { BusEvents } from './bus-message.ts';
import type { BusOptions } from './connection.ts';
import type { LinkMessage, LinkStatus, TensorLink } from './tensor-link.ts';

export class BusLink implements TensorLink {
  readonly kind = 'nats';
  readonly #bus: Bus;

  private constructor(bus: Bus) {
    this.#bus = bus;
  }

  /** @throws LaminaError `nats_unreachable` */
  static async connect(options: BusOptions, events: BusEvents): Promise<BusLink> {
    return new BusLink(await Bus.connect(options, events));
  }

  get maxPayloadBytes(): number {
    return this.#bus.maxPayloadBytes;
  }

  get isClosed(): boolean {
    return this.#bus.isClosed;
  }

  publish(subject: string, data: Uint8Array, reply?: string): void {
    this.#bus.publish(subject, data, reply);
  }

  subscribe(subject: string, callback: (message: LinkMessage) => void): Subscription {
    return this.#bus.subscribe(subject, callback);
  }

  receive(): boolean {
    return false;
  }

  onStatus(callback: (status: LinkStatus) => void): void {
    this.#bus.onStatus((type) => {
      if (type === 'disconnect' || type === 'reconnect') callback(type);
    });
  }

  flush(): Promise<void> {
    return this.#bus.flush();
  }

  close(): Promise<boolean> {
    return this.#bus.close();
  }
}
