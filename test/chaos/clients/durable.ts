/**
 * Owns the client of a durable prompt: it trusts only what the server confirmed, and submits again under the same id until it
 * has a PubAck. What it reads is what is stored.
 */
import type { Bus } from '@lamina/bus';
import { SUBJECTS } from '@lamina/protocol';
import { bodyOf, sleep } from '../requests.ts';
import { type Asked, type Client, RETRY_MS } from './client.ts';

const SUBMIT_TIMEOUT_MS = 2_000;

export class DurableClient implements Client {
  readonly kind = 'durable';
  readonly #bus: Bus;

  constructor(bus: Bus) {
    this.#bus = bus;
  }

  async answer({ id, request, signal }: Asked): Promise<undefined> {
    const data = new TextEncoder().encode(JSON.stringify({ id, ...bodyOf(request) }));
    while (!signal.aborted && !(await this.#submitted(id, data))) await sleep(RETRY_MS);
  }

  async #submitted(id: string, data: Uint8Array): Promise<boolean> {
    try {
      const options = { msgID: id, timeout: SUBMIT_TIMEOUT_MS };
      await this.#bus.connection.jetstream().publish(SUBJECTS.prompts, data, options);
      return true;
    } catch {
      return false;
    }
  }
}
