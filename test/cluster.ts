/**
 * Owns real clusters for tests: every service a process of its own, on a nats-server of its own.
 *
 * Invariants
 * 1. Ports are free ones and LAMINA_* variables of the caller do not reach a test, save the path of nats-server.
 * 2. A cluster of one test ends with it, also if it fails.
 * 3. Built graphs are cached in one directory per checkout, so only the first cluster of a model builds them.
 */
import { createHash } from 'node:crypto';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import {
  type Child,
  type Cluster,
  type ClusterOptions,
  ROOT_DIRECTORY,
  type ServiceSettings,
  startCluster,
} from '@lamina/cli';
import { decodeTokens, SUBJECTS, type TokenMessage } from '@lamina/protocol';
import { natsServerOf, processEnvironment } from '@lamina/runtime';
import { LaminaError } from '@lamina/tensor';
import { onTestFailed, onTestFinished } from 'vitest';

export interface TestClusterOptions {
  readonly attentionShards?: number;
  readonly denseExecutors?: number;
  /** Directory or repository; default: the bundled lamina-tiny. */
  readonly model?: string;
  /** Variables of all processes, over the caller's. */
  readonly environment?: Readonly<Record<string, string>>;
  /** For all services. */
  readonly settings?: ServiceSettings;
  /** A server that the test runs itself. */
  readonly natsUrl?: string;
  /** For tests that end processes; without it such an end fails what waits for the cluster. */
  readonly onExit?: ClusterOptions['onExit'];
  /** Sees every log line of every process. */
  readonly onLine?: (name: string, line: string) => void;
}

export interface TestCluster {
  readonly cluster: Cluster;
  /** Sends a body as an ordinary client and resolves with all token messages, the last one an error or not. */
  generate(body: object | string | Uint8Array, onToken?: (message: TokenMessage) => void): Promise<TokenMessage[]>;
  addShard(settings?: ServiceSettings): Promise<Child>;
  /** The last log lines of every process: print them when a test fails. */
  logs(): string;
  stop(): Promise<void>;
}

const LOG_LINES = 400;
const checkoutHash = createHash('sha256').update(ROOT_DIRECTORY).digest('hex').slice(0, 12);

/** Where graphs that tests build are kept. */
export const TEST_CACHE_DIRECTORY = join(tmpdir(), `lamina-test-cache-${checkoutHash}`);

export async function startTestCluster(options: TestClusterOptions = {}): Promise<TestCluster> {
  const lines: string[] = [];
  const environment = processEnvironment();
  const cluster = await startCluster({
    attentionShards: options.attentionShards ?? 2,
    denseExecutors: options.denseExecutors ?? 1,
    natsPort: 0,
    httpPort: 0,
    natsUrl: options.natsUrl,
    natsServer: natsServerOf(environment),
    environment: {
      ...Object.fromEntries(Object.entries(environment).filter(([name]) => !name.startsWith('LAMINA_'))),
      ...options.environment,
    },
    settings: {
      model: options.model ?? join(ROOT_DIRECTORY, 'models', 'lamina-tiny'),
      cacheDir: TEST_CACHE_DIRECTORY,
      ...options.settings,
    },
    onExit: options.onExit,
    onLine: (name, line) => {
      options.onLine?.(name, line);
      lines.push(`[${name}] ${line}`);
      if (lines.length > LOG_LINES) lines.shift();
    },
  });
  return {
    cluster,
    generate: (body, onToken) => generate(cluster, body, onToken),
    addShard: (settings) => cluster.addShard(settings),
    logs: () => lines.join('\n'),
    stop: () => cluster.stop(),
  };
}

/**
 * The same for one test, called in the test or in `beforeEach`: it is stopped afterwards, before what was given to
 * `onTestFinished` earlier, and its log is printed if the test has failed.
 */
export async function startForTest(options: TestClusterOptions = {}): Promise<TestCluster> {
  const tested = await startTestCluster(options);
  onTestFinished(() => tested.stop());
  onTestFailed(() => console.log(tested.logs()));
  return tested;
}

function generate(
  cluster: Cluster,
  body: object | string | Uint8Array,
  onToken?: (message: TokenMessage) => void,
): Promise<TokenMessage[]> {
  const data =
    body instanceof Uint8Array
      ? body
      : new TextEncoder().encode(typeof body === 'string' ? body : JSON.stringify(body));
  const answered = new Promise<TokenMessage[]>((resolve, reject) => {
    const messages: TokenMessage[] = [];
    const subscription = cluster.bus.requestStream(SUBJECTS.generate, data, (reply) => {
      if (reply === undefined) {
        subscription.unsubscribe();
        reject(new LaminaError('unavailable', 'no gateway listens'));
        return;
      }
      for (const message of decodeTokens(reply.data)) {
        messages.push(message);
        onToken?.(message);
        if (message.finish_reason === null) continue;
        subscription.unsubscribe();
        resolve(messages);
      }
    });
  });
  return Promise.race([answered, cluster.failure.then((error) => Promise.reject(error))]);
}
