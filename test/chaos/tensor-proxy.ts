/**
 * Owns a TCP proxy in front of nats-server that understands its protocol well enough to harm messages on the way: it
 * delays, duplicates, reorders and corrupts those of the tensor plane, and can be cut like a cable.
 *
 * Invariants
 * 1. Only payloads on tensor subjects are touched; the protocol around them stays valid, so what is tested is Lamina and
 *    not the parser of nats-server.
 * 2. Which message is harmed, and how, comes from the seeded generator.
 */
import { once } from 'node:events';
import { type AddressInfo, connect, createServer, type Server, type Socket } from 'node:net';
import type { Random } from './random.ts';

export type Harm = 'delay' | 'duplicate' | 'reorder' | 'corrupt';

export interface ProxyOptions {
  readonly serverPort: number;
  readonly random: Random;
  readonly harms: readonly Harm[];
  /** Share of tensor messages that are harmed. */
  readonly rate: number;
  /** Address to listen on. */
  readonly host?: string;
}

const TENSOR_SUBJECT = /^lamina\.v1\.tensor\./;
const CARRIES_PAYLOAD = /^(PUB|HPUB|MSG|HMSG) (\S+)(?: .*)? (\d+)$/;
const DELAY_MS = 60;

/** Splits a stream of the NATS protocol into whole messages, those with a payload as one piece. */
class Splitter {
  #rest: Buffer = Buffer.alloc(0);
  readonly #onPiece: (piece: Buffer, subject: string | undefined, payloadBytes: number) => void;

  constructor(onPiece: (piece: Buffer, subject: string | undefined, payloadBytes: number) => void) {
    this.#onPiece = onPiece;
  }

  push(chunk: Buffer): void {
    this.#rest = this.#rest.length === 0 ? chunk : Buffer.concat([this.#rest, chunk]);
    let at = 0;
    for (;;) {
      const lineEnd = this.#rest.indexOf('\r\n', at);
      if (lineEnd < 0) break;
      const match = CARRIES_PAYLOAD.exec(this.#rest.toString('latin1', at, lineEnd));
      const payloadBytes = match === null ? 0 : Number(match[3]);
      const end = match === null ? lineEnd + 2 : lineEnd + 2 + payloadBytes + 2;
      if (end > this.#rest.length) break;
      this.#onPiece(Buffer.from(this.#rest.subarray(at, end)), match?.[2], payloadBytes);
      at = end;
    }
    this.#rest = this.#rest.subarray(at);
  }
}

export class TensorProxy {
  readonly #options: ProxyOptions;
  readonly #server: Server;
  readonly #sockets = new Set<Socket>();
  /** Messages harmed, by kind. */
  readonly numHarmed: Record<Harm, number> = { delay: 0, duplicate: 0, reorder: 0, corrupt: 0 };
  isHarming = false;

  private constructor(options: ProxyOptions) {
    this.#options = options;
    this.#server = createServer((client) => this.#join(client));
  }

  static async start(options: ProxyOptions): Promise<TensorProxy> {
    const proxy = new TensorProxy(options);
    proxy.#server.listen(0, options.host ?? '127.0.0.1');
    await once(proxy.#server, 'listening');
    return proxy;
  }

  get url(): string {
    const { address, port } = this.#server.address() as AddressInfo;
    return `nats://${address}:${port}`;
  }

  async stop(): Promise<void> {
    for (const socket of this.#sockets) socket.destroy();
    this.#server.close();
    await once(this.#server, 'close');
  }

  #join(client: Socket): void {
    const server = connect(this.#options.serverPort, '127.0.0.1');
    this.#forward(client, server);
    this.#forward(server, client);
    for (const [socket, other] of [
      [client, server],
      [server, client],
    ] as const) {
      this.#sockets.add(socket);
      socket.setNoDelay(true);
      socket.on('error', () => socket.destroy());
      socket.on('close', () => {
        this.#sockets.delete(socket);
        other.destroy();
      });
    }
  }

  #forward(from: Socket, to: Socket): void {
    const { random, harms, rate } = this.#options;
    /** Held back so that the next one overtakes it. */
    let held: Buffer | undefined;
    const send = (piece: Buffer): void => {
      if (to.writable) to.write(piece);
    };
    const release = (): void => {
      if (held !== undefined) send(held);
      held = undefined;
    };
    const splitter = new Splitter((piece, subject, payloadBytes) => {
      const isTensor = subject !== undefined && TENSOR_SUBJECT.test(subject) && payloadBytes > 0;
      if (!isTensor || !this.isHarming || random.next() >= rate) {
        send(piece);
        if (isTensor) release();
        return;
      }
      const harm = random.pick(harms);
      this.numHarmed[harm]++;
      if (harm === 'delay') setTimeout(() => send(piece), random.between(1, DELAY_MS));
      else if (harm === 'duplicate') {
        send(piece);
        const again = Buffer.from(piece);
        setTimeout(() => send(again), random.between(0, DELAY_MS));
      } else if (harm === 'reorder') {
        release();
        held = piece;
        // Without a message after it, it is only late.
        setTimeout(release, DELAY_MS);
      } else {
        const start = piece.length - 2 - payloadBytes;
        for (let flips = random.between(1, 4); flips > 0; flips--) {
          const at = start + random.between(0, payloadBytes);
          piece[at] = piece[at]! ^ (1 << random.between(0, 8));
        }
        send(piece);
      }
    });
    from.on('data', (chunk: Buffer) => splitter.push(chunk));
  }
}
