/** Owns a cluster whose one attention-shard is throttled (throttle.ts). */
import { type ChildProcess, fork } from 'node:child_process';
import { createServer } from 'node:net';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { Child, ROOT_DIRECTORY, type ServiceSettings } from '@lamina/cli';
import { processEnvironment, SETTINGS } from '@lamina/runtime';
import { LaminaPeer } from './peers/lamina.ts';

const THROTTLE = fileURLToPath(new URL('throttle.js', import.meta.url));
const STOP_GRACE_MS = 5_000;

function freePort(): Promise<number> {
  return new Promise((resolve, reject) => {
    const server = createServer();
    server.once('error', reject);
    server.listen(0, '127.0.0.1', () => {
      const address = server.address();
      server.close(() =>
        typeof address === 'object' && address ? resolve(address.port) : reject(new Error('no port')),
      );
    });
  });
}

export class ThrottledLamina {
  readonly peer: LaminaPeer;
  readonly #relay: ChildProcess;
  readonly #shard: Child;

  private constructor(peer: LaminaPeer, relay: ChildProcess, shard: Child) {
    this.peer = peer;
    this.#relay = relay;
    this.#shard = shard;
  }

  /** Starts everything, the throttle open. */
  static async start(model: string, directory: string, settings: ServiceSettings): Promise<ThrottledLamina> {
    const natsPort = await freePort();
    const relay = fork(THROTTLE, [String(natsPort)], { execArgv: [] });
    const relayPort = await new Promise<number>((resolve, reject) => {
      relay.once('message', (port) => resolve(Number(port)));
      relay.once('exit', () => reject(new Error('the throttle did not start')));
    });
    // The cluster is ready only with a shard, and this one connects when the server is there.
    const shard = new Child({
      name: 'attention-shard',
      command: process.execPath,
      args: [join(ROOT_DIRECTORY, 'services/attention-shard/dist/main.js')],
      environment: {
        ...processEnvironment(),
        [SETTINGS.natsUrl.env]: `nats://127.0.0.1:${relayPort}`,
        [SETTINGS.natsConnectTimeoutMs.env]: '120000',
        [SETTINGS.kvBudgetBytes.env]: '2g',
        [SETTINGS.logLevel.env]: 'warn',
      },
    });
    const throttled = new ThrottledLamina(new LaminaPeer({ attentionShards: 0, natsPort, settings }), relay, shard);
    try {
      await throttled.peer.start(model, directory);
      return throttled;
    } catch (cause) {
      await throttled.stop();
      throw cause;
    }
  }

  throttle(nanosecondsPerByte: number): void {
    this.#relay.send(nanosecondsPerByte);
  }

  async stop(): Promise<void> {
    await this.peer.dispose();
    await this.#shard.stop(STOP_GRACE_MS);
    this.#relay.kill('SIGKILL');
  }
}
