/** Owns a cluster whose one attention-shard is throttled (throttle.ts). */
import { type ChildProcess, fork } from 'node:child_process';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { Child, ROOT_DIRECTORY, type ServiceSettings } from '@lamina/cli';
import { processEnvironment, SETTINGS } from '@lamina/runtime';
import { type NatsServer, startNatsServer } from '@lamina/testkit/nats-server';
import { LaminaPeer } from './peers/lamina.ts';

const THROTTLE = fileURLToPath(new URL('throttle.js', import.meta.url));
const STOP_GRACE_MS = 5_000;
/** As the server of a local cluster takes. */
const MAX_PAYLOAD_BYTES = 8 * 1024 * 1024;

export class ThrottledLamina {
  readonly peer: LaminaPeer;
  readonly #nats: NatsServer;
  readonly #relay: ChildProcess;
  readonly #shard: Child;

  private constructor(peer: LaminaPeer, nats: NatsServer, relay: ChildProcess, shard: Child) {
    this.peer = peer;
    this.#nats = nats;
    this.#relay = relay;
    this.#shard = shard;
  }

  /** Starts everything, the throttle open. */
  static async start(model: string, directory: string, settings: ServiceSettings): Promise<ThrottledLamina> {
    const nats = await startNatsServer({ maxPayloadBytes: MAX_PAYLOAD_BYTES });
    const relay = fork(THROTTLE, [String(nats.port)], { execArgv: [] });
    const relayPort = await new Promise<number>((resolve, reject) => {
      relay.once('message', (port) => resolve(Number(port)));
      relay.once('exit', () => reject(new Error('the throttle did not start')));
    });
    const shard = new Child({
      name: 'attention-shard',
      command: process.execPath,
      args: [join(ROOT_DIRECTORY, 'services/attention-shard/dist/main.js')],
      environment: {
        ...processEnvironment(),
        [SETTINGS.natsUrl.env]: `nats://127.0.0.1:${relayPort}`,
        [SETTINGS.kvBudgetBytes.env]: '2g',
        [SETTINGS.logLevel.env]: 'warn',
      },
    });
    const peer = new LaminaPeer({ attentionShards: 0, natsUrl: nats.url, settings });
    const throttled = new ThrottledLamina(peer, nats, relay, shard);
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
    await this.#nats.stop();
  }
}
