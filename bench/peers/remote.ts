/** Owns a peer in a process of its own, as seen from the benchmark. */
import { type ChildProcess, fork } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import type { Contestant, Opened, WindowLimits, Workload } from './peer.ts';

const HOST = fileURLToPath(new URL('host.js', import.meta.url));
export const PEER_NAMES = {
  'llama-cpp': 'node-llama-cpp Q4_0',
  'llama-cpp-q8': 'node-llama-cpp Q8_0',
  'ort-loop': 'ONNX Runtime loop',
  'transformers-js': 'transformers.js',
} as const;
export type PeerName = keyof typeof PEER_NAMES;

export type PeerCall =
  | { readonly method: 'open'; readonly workload: Workload }
  | { readonly method: 'window'; readonly limits: WindowLimits }
  | { readonly method: 'close' | 'dispose' };

export interface PeerReply {
  readonly opened?: Opened;
  readonly rate?: number;
  readonly error?: string;
}

export class RemotePeer implements Contestant {
  readonly name: string;
  readonly #kind: PeerName;
  #child: ChildProcess | undefined;

  constructor(kind: PeerName) {
    this.name = PEER_NAMES[kind];
    this.#kind = kind;
  }

  async open(workload: Workload): Promise<Opened> {
    const { opened } = await this.#call({ method: 'open', workload });
    if (opened === undefined) throw new Error(`${this.name} gave no answer`);
    return opened;
  }

  async window(limits: WindowLimits): Promise<number> {
    const { rate } = await this.#call({ method: 'window', limits });
    if (rate === undefined) throw new Error(`${this.name} gave no answer`);
    return rate;
  }

  async close(): Promise<void> {
    if (this.#child !== undefined) await this.#call({ method: 'close' });
  }

  async dispose(): Promise<void> {
    const child = this.#child;
    if (child === undefined) return;
    this.#child = undefined;
    const ended = new Promise((resolve) => child.once('exit', resolve));
    child.kill('SIGKILL');
    await ended;
  }

  #call(call: PeerCall): Promise<PeerReply> {
    this.#child ??= fork(HOST, [this.#kind], { stdio: ['ignore', 'inherit', 'inherit', 'ipc'], execArgv: [] });
    const child = this.#child;
    return new Promise((resolve, reject) => {
      const settle = (result: PeerReply | undefined): void => {
        child.off('message', settle);
        child.off('exit', onExit);
        if (result?.error !== undefined) reject(new Error(`${this.name}: ${result.error}`));
        else resolve(result ?? {});
      };
      const onExit = (): void => settle({ error: 'its process ended' });
      child.on('message', settle);
      child.on('exit', onExit);
      child.send(call);
    });
  }
}
