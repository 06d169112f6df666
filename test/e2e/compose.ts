/**
 * Owns one run of docker-compose.yml with a real Docker Engine: its own names, ports, images and volumes, all removed at
 * the end whatever happened.
 */
import { execFile } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { createServer } from 'node:net';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';

export const REPO_ROOT = fileURLToPath(new URL('../..', import.meta.url)).replace(/\/$/, '');

const OFFLINE_NODE_IMAGE = 'lamina-offline/node:local';
const OFFLINE_NATS_IMAGE = 'lamina-offline/nats:local';
const execute = promisify(execFile);

async function run(command: string, args: readonly string[], env: Readonly<Record<string, string>> = {}) {
  try {
    const { stdout } = await execute(command, args, {
      cwd: REPO_ROOT,
      env: { ...process.env, ...env },
      maxBuffer: 64 * 1024 * 1024,
    });
    return stdout;
  } catch (cause) {
    const { stdout = '', stderr = '' } = cause as { stdout?: string; stderr?: string };
    throw new Error(`${command} ${args.join(' ')} failed\n${stdout.slice(-4000)}\n${stderr.slice(-4000)}`, { cause });
  }
}

const succeeds = (command: string, args: readonly string[]): Promise<boolean> =>
  run(command, args).then(
    () => true,
    () => false,
  );

/** The Compose of this machine: v1 as its own command, or v2 as docker's. */
async function findCompose(): Promise<{ command: string; first: readonly string[] } | null> {
  if (await succeeds('docker-compose', ['version'])) return { command: 'docker-compose', first: [] };
  if (await succeeds('docker', ['compose', 'version'])) return { command: 'docker', first: ['compose'] };
  return null;
}

/** Whether the base images are the ones of deploy/offline-images.sh: LAMINA_OFFLINE_IMAGES=1 / 0, else whether they exist. */
async function usesOfflineImages(): Promise<boolean> {
  const wish = process.env.LAMINA_OFFLINE_IMAGES ?? '';
  if (wish !== '') return wish !== '0';
  return succeeds('docker', ['image', 'inspect', OFFLINE_NODE_IMAGE, OFFLINE_NATS_IMAGE]);
}

/** Why there can be no compose test on this machine; null if there can. */
export async function reasonToSkip(): Promise<string | null> {
  if (process.env.LAMINA_OFFLINE_IMAGES === '1') await run(`${REPO_ROOT}/deploy/offline-images.sh`, []);
  if (!(await succeeds('docker', ['info']))) {
    return 'no Docker Engine answers `docker info` (deploy/offline-images.sh sets one up on Debian and Ubuntu)';
  }
  return (await findCompose()) === null ? 'neither `docker-compose` nor `docker compose` is installed' : null;
}

function freePort(): Promise<number> {
  return new Promise((resolve, reject) => {
    const server = createServer();
    server.on('error', reject);
    server.listen(0, '127.0.0.1', () => {
      const address = server.address();
      server.close(() =>
        typeof address === 'object' && address ? resolve(address.port) : reject(new Error('no port')),
      );
    });
  });
}

export class ComposeProject {
  readonly natsUrl: string;
  readonly httpUrl: string;
  readonly #name: string;
  readonly #compose: { command: string; first: readonly string[] };
  readonly #env: Readonly<Record<string, string>>;
  #files: readonly string[] = [];

  private constructor(
    name: string,
    compose: { command: string; first: readonly string[] },
    ports: { nats: number; http: number },
    env: Readonly<Record<string, string>>,
  ) {
    this.#name = name;
    this.#compose = compose;
    this.natsUrl = `nats://127.0.0.1:${ports.nats}`;
    this.httpUrl = `http://127.0.0.1:${ports.http}`;
    this.#env = env;
  }

  static async create(settings: Readonly<Record<string, string>>): Promise<ComposeProject> {
    const compose = await findCompose();
    if (compose === null) throw new Error('no Compose');
    const name = `lamina-e2e-${randomBytes(4).toString('hex')}`;
    const ports = { nats: await freePort(), http: await freePort() };
    const offline = (await usesOfflineImages())
      ? { LAMINA_NODE_IMAGE: OFFLINE_NODE_IMAGE, NATS_IMAGE: OFFLINE_NATS_IMAGE, LAMINA_BUILD_NETWORK: 'host' }
      : {};
    return new ComposeProject(name, compose, ports, {
      ...offline,
      ...settings,
      LAMINA_IMAGE: `${name}:test`,
      LAMINA_NATS_IMAGE: `${name}-nats:test`,
      LAMINA_NATS_PORT: String(ports.nats),
      LAMINA_HTTP_PORT: String(ports.http),
    });
  }

  compose(...args: string[]): Promise<string> {
    return run(this.#compose.command, [...this.#compose.first, ...this.#files, '-p', this.#name, ...args], this.#env);
  }

  /** From now on with another file over docker-compose.yml, given from the root of the repository. */
  overlay(file: string): void {
    this.#files = ['-f', 'docker-compose.yml', '-f', file];
  }

  build(): Promise<string> {
    return this.compose('build');
  }

  /** Starts what is not running yet; running containers stay as they are. */
  up(attentionShards: number): Promise<string> {
    return this.compose('up', '-d', '--no-build', '--no-recreate', '--scale', `attention-shard=${attentionShards}`);
  }

  /** Asks until the answer is 200. */
  async ready(timeoutMs: number): Promise<void> {
    const deadline = Date.now() + timeoutMs;
    let last = 'no answer';
    while (Date.now() < deadline) {
      try {
        const response = await fetch(`${this.httpUrl}/health`, { signal: AbortSignal.timeout(2_000) });
        if (response.status === 200) return;
        last = `${response.status} ${await response.text()}`;
      } catch (error) {
        last = String(error);
      }
      await new Promise((resolve) => setTimeout(resolve, 250));
    }
    throw new Error(`${this.httpUrl}/health: ${last}\n${await this.logs()}`);
  }

  logs(): Promise<string> {
    return this.compose('logs', '--no-color', '--tail=50');
  }

  /** State of every container of the project, by its service. */
  async containers(): Promise<
    { service: string; status: string; exitCode: number; user: string; readOnly: boolean }[]
  > {
    const label = 'com.docker.compose';
    const ids = await run('docker', ['ps', '-aq', '--filter', `label=${label}.project=${this.#name}`]);
    const format = `{{index .Config.Labels "${label}.service"}} {{.State.Status}} {{.State.ExitCode}} {{.Config.User}} {{.HostConfig.ReadonlyRootfs}}`;
    const lines = await run('docker', ['inspect', '--format', format, ...ids.trim().split(/\s+/)]);
    return lines
      .trim()
      .split('\n')
      .map((line) => {
        const [service = '', status = '', exitCode = '', user = '', readOnly = ''] = line.split(' ');
        return { service, status, exitCode: Number(exitCode), user, readOnly: readOnly === 'true' };
      });
  }

  /** Removes containers, network, volumes and images of this run, and build stages that no later build will use. */
  async remove(): Promise<void> {
    await this.compose('down', '--volumes', '--remove-orphans', '--timeout', '5');
    // --no-prune keeps the layers: they are the next build's cache.
    await succeeds('docker', ['image', 'rm', '--no-prune', `${this.#name}:test`, `${this.#name}-nats:test`]);
    await succeeds('docker', ['image', 'prune', '-f', '--filter', 'label=lamina.stage', '--filter', 'until=24h']);
  }
}
