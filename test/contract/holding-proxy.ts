/**
 * Owns a TCP proxy in front of nats-server that holds back what one client sends, as a network does that has not lost it:
 * the client's end can be cut, and what was held comes to the server later. Or that loses what is sent to a client, and then
 * its connection.
 *
 * Invariants
 * 1. Only connections whose client gives itself the name are held, or lose something, and only those that were open when it began.
 * 2. Bytes reach the server unchanged and in order, or not at all.
 */
import { once } from 'node:events';
import { type AddressInfo, connect, createServer, type Server, type Socket } from 'node:net';

/** A connection that is held. */
interface Held {
  readonly client: Socket;
  readonly server: Socket;
  readonly chunks: Buffer[];
}

interface Joined {
  readonly client: Socket;
  readonly server: Socket;
  name: string;
  held: Held | undefined;
  isLosing: boolean;
}

export class HoldingProxy {
  readonly #server: Server;
  readonly #joined = new Set<Joined>();
  readonly #held: Held[] = [];
  #pattern: RegExp | undefined;
  #text = '';
  #numToPass = 0;
  #losing: { readonly name: RegExp; readonly isFirst: (chunk: string) => boolean } | undefined;

  private constructor(port: number) {
    this.#server = createServer((client) => this.#join(client, connect(port, '127.0.0.1')));
  }

  static async start(natsUrl: string): Promise<HoldingProxy> {
    const proxy = new HoldingProxy(Number(new URL(natsUrl).port));
    proxy.#server.listen(0, '127.0.0.1');
    await once(proxy.#server, 'listening');
    return proxy;
  }

  get url(): string {
    return `nats://127.0.0.1:${(this.#server.address() as AddressInfo).port}`;
  }

  /** Holds what clients of that name send from the chunk on that has `text` after `numToPass` chunks with it have passed. */
  hold(name: RegExp, text: string, numToPass: number): void {
    this.#pattern = name;
    this.#text = text;
    this.#numToPass = numToPass;
  }

  /** Whether a client of that name has come. */
  hasClient(name: RegExp): boolean {
    return [...this.#joined].some((joined) => name.test(joined.name));
  }

  /** How often `text` is held back. */
  numHeld(text: string): number {
    const all = this.#held.map(({ chunks }) => Buffer.concat(chunks).toString('latin1')).join('');
    return all.split(text).length - 1;
  }

  /** Cuts the clients that are held off: they see it, the server does not. */
  cut(): void {
    this.#pattern = undefined;
    for (const { client } of this.#held) client.destroy();
  }

  /** What was held comes to the server. */
  release(): void {
    for (const { server, chunks } of this.#held) server.write(Buffer.concat(chunks.splice(0)));
  }

  /** Loses what is sent to clients of that name, from the chunk on of which `isFirst` says so. */
  lose(name: RegExp, isFirst: (chunk: string) => boolean): void {
    this.#losing = { name, isFirst };
  }

  /** Whether something was lost. */
  get isLosing(): boolean {
    return [...this.#joined].some((joined) => joined.isLosing);
  }

  /** Cuts the clients that lose something: both ends see it. */
  cutLosing(): void {
    this.#losing = undefined;
    for (const { client, server, isLosing } of this.#joined) {
      if (!isLosing) continue;
      client.destroy();
      server.destroy();
    }
  }

  async stop(): Promise<void> {
    for (const { client, server } of [...this.#joined, ...this.#held]) {
      client.destroy();
      server.destroy();
    }
    this.#server.close();
    await once(this.#server, 'close');
  }

  #join(client: Socket, server: Socket): void {
    const joined: Joined = { client, server, name: '', held: undefined, isLosing: false };
    this.#joined.add(joined);
    client.setNoDelay(true);
    server.setNoDelay(true);
    server.on('data', (chunk: Buffer) => {
      if (this.#losing?.name.test(joined.name)) joined.isLosing ||= this.#losing.isFirst(chunk.toString('latin1'));
      if (!joined.isLosing && client.writable) client.write(chunk);
    });
    client.on('data', (chunk: Buffer) => this.#forward(joined, chunk));
    for (const socket of [client, server]) {
      socket.on('error', () => socket.destroy());
      socket.on('close', () => {
        this.#joined.delete(joined);
        client.destroy();
        if (joined.held === undefined) server.destroy();
      });
    }
  }

  #forward(joined: Joined, chunk: Buffer): void {
    const { client, server } = joined;
    joined.name ||= /CONNECT .*"name":"([^"]*)"/.exec(chunk.toString('latin1'))?.[1] ?? '';
    if (joined.held === undefined && this.#pattern?.test(joined.name) && chunk.includes(this.#text)) {
      if (this.#numToPass-- <= 0) {
        joined.held = { client, server, chunks: [] };
        this.#held.push(joined.held);
      }
    }
    if (joined.held !== undefined) joined.held.chunks.push(chunk);
    else server.write(chunk);
  }
}
