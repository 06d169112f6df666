/**
 * Owns one server-sent event stream over an HTTP reply.
 *
 * Invariants
 * 1. Nothing is sent before the first event: what fails until then is an ordinary error reply.
 * 2. What waits for a slow reader is bounded: beyond MAX_WAITING_BYTES the connection is cut, and the reader may resume.
 */
import type { FastifyReply } from 'fastify';

const MAX_WAITING_BYTES = 1024 * 1024;

export class EventStream {
  readonly #reply: FastifyReply;
  #isOpen = false;

  constructor(reply: FastifyReply) {
    this.#reply = reply;
  }

  get isOpen(): boolean {
    return this.#isOpen;
  }

  /** `id` is what a reader sends back as Last-Event-ID. */
  send(data: object | string, id?: number): void {
    const { raw } = this.#reply;
    if (raw.destroyed) return;
    this.#open();
    const text = typeof data === 'string' ? data : JSON.stringify(data);
    raw.write(`${id === undefined ? '' : `id: ${id}\n`}data: ${text}\n\n`);
    if (raw.writableLength > MAX_WAITING_BYTES) raw.destroy();
  }

  end(): void {
    if (!this.#reply.raw.destroyed) this.#reply.raw.end();
  }

  #open(): void {
    if (this.#isOpen) return;
    this.#isOpen = true;
    this.#reply.hijack();
    for (const [name, value] of Object.entries(this.#reply.getHeaders()))
      if (value !== undefined) this.#reply.raw.setHeader(name, value);
    this.#reply.raw.writeHead(200, {
      'content-type': 'text/event-stream; charset=utf-8',
      'cache-control': 'no-cache',
      'x-accel-buffering': 'no',
    });
  }
}
