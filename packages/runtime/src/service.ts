/**
 * Owns the life of a service process: configuration, connection, start, stop, exit status.
 *
 * Invariants
 * 1. A process that cannot start prints one line that says what and what to do, and exits 1.
 * 2. The first SIGTERM or SIGINT stops gracefully (exit 0); the second ends at once.
 * 3. An error that nobody handled ends the process: a service in an unknown state must not go on.
 */
import { randomBytes } from 'node:crypto';
import { hostname } from 'node:os';
import { Bus } from '@lamina/bus';
import { SERVICE_NAMES } from '@lamina/protocol';
import { asLaminaError } from '@lamina/tensor';
import { type Complain, createComplaints } from './complaints.ts';
import { processEnvironment, readConfig } from './config.ts';
import { createLogger, type Logger } from './log.ts';
import { answerMetrics, createRegistry, type Registry } from './metrics.ts';
import { natsAccessOf } from './nats-access.ts';
import type { Config, Service } from './settings.ts';
import { VERSION } from './version.ts';

export interface ServiceContext {
  readonly service: Service;
  /** Unique to this process: a restarted service is another instance. */
  readonly instanceId: string;
  readonly config: Config;
  readonly bus: Bus;
  readonly log: Logger;
  readonly registry: Registry;
  /** For messages that failed: counts them, and logs as many as anybody reads. */
  readonly complain: Complain;
  /** Ends the process with exit status 1 after logging: for failures in callbacks that nobody awaits. */
  readonly fail: (cause: unknown) => void;
}

export interface RunningService {
  /** Extra facts for $SRV.STATS. */
  readonly stats?: () => unknown;
  /** Finishes what can be finished; the connection closes afterwards. */
  stop(): Promise<void>;
}

/** A short random id, safe as a subject token. */
export function createInstanceId(prefix: string): string {
  return `${prefix}-${randomBytes(6).toString('hex')}`;
}

const STOP_TIMEOUT_MS = 15_000;

/** Runs one service until it is told to stop. Never returns normally to a caller that needs the process. */
export async function runService(
  service: Service,
  description: string,
  start: (context: ServiceContext) => Promise<RunningService>,
): Promise<void> {
  let log: Logger | undefined;
  const fail = (cause: unknown): never => {
    const error = asLaminaError(cause);
    if (log !== undefined && error.code === 'internal') log.fatal({ err: error }, 'ended by an error');
    process.stderr.write(`lamina ${service}: ${error.message} [${error.code}]\n`);
    process.exit(1);
  };
  process.on('uncaughtException', fail);
  process.on('unhandledRejection', fail);
  try {
    const config = readConfig(service, process.argv.slice(2), processEnvironment());
    const instanceId = createInstanceId(
      service === 'attention-shard' ? 'shard' : service === 'dense-executor' ? 'executor' : service,
    );
    log = createLogger({ level: config.logLevel, service, instance: instanceId });
    const logger = log;
    const registry = createRegistry(service, instanceId);
    const complain = createComplaints(logger, registry);
    const stopped = new Promise<void>((resolve) => listenForSignals(resolve));
    const bus = await Promise.race([
      Bus.connect(
        {
          url: config.natsUrl,
          name: `${service} ${instanceId}`,
          connectTimeoutMs: config.natsConnectTimeoutMs,
          access: natsAccessOf(config, service),
        },
        { onError: complain },
      ),
      stopped.then(() => undefined),
    ]);
    if (bus === undefined) {
      logger.info('stopped before nats-server answered');
      process.exit(0);
    }
    bus.onStatus((type, detail) => logger.debug({ type, detail }, 'connection'));
    let running: RunningService | undefined;
    await bus.service.announce({
      name: SERVICE_NAMES[service],
      version: VERSION,
      description,
      metadata: { instance: instanceId, host: hostname(), pid: String(process.pid) },
      stats: () => running?.stats?.() ?? null,
    });
    answerMetrics(bus, registry, (cause) => logger.error({ err: cause }, 'metrics failed'));
    running = await Promise.race([
      start({ service, instanceId, config, bus, log, registry, complain, fail }),
      stopped.then(() => undefined),
    ]);
    if (running !== undefined) {
      logger.info('ready');
      await stopped;
      await withTimeout(running.stop(), STOP_TIMEOUT_MS, () => logger.warn('stopping took too long'));
    }
    if (!(await bus.close())) logger.warn('connection did not drain');
    logger.info('stopped');
    process.exit(0);
  } catch (cause) {
    fail(cause);
  }
}

function listenForSignals(onStop: () => void): void {
  let signals = 0;
  const onSignal = (): void => {
    signals++;
    if (signals > 1) process.exit(130);
    onStop();
  };
  process.on('SIGTERM', onSignal);
  process.on('SIGINT', onSignal);
}

async function withTimeout(work: Promise<void>, timeoutMs: number, onTimeout: () => void): Promise<void> {
  let timer: NodeJS.Timeout | undefined;
  const timeout = new Promise<void>((resolve) => {
    timer = setTimeout(() => {
      onTimeout();
      resolve();
    }, timeoutMs);
  });
  await Promise.race([work, timeout]);
  clearTimeout(timer);
}
