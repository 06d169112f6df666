/**
 * Owns running a service's real code inside a test, on a connection of its own.
 */
import { Bus } from '@lamina/bus';
import { SERVICE_NAMES } from '@lamina/protocol';
import {
  createComplaints,
  createInstanceId,
  createLogger,
  Registry,
  type RunningService,
  readConfig,
  type Service,
  type ServiceContext,
} from '@lamina/runtime';
import { VERSION } from '@lamina/runtime/config';

export interface InProcessService {
  readonly context: ServiceContext;
  readonly running: RunningService;
  /** What the service told `fail`: a real process would have ended. */
  readonly failures: unknown[];
  stop(): Promise<void>;
  /** Cuts the connection without a word, as a crash does. */
  crash(): Promise<void>;
}

export async function startInProcess(
  service: Service,
  start: (context: ServiceContext) => Promise<RunningService>,
  url: string,
  flags: readonly string[] = [],
): Promise<InProcessService> {
  const instanceId = createInstanceId(service === 'attention-shard' ? 'shard' : service);
  const bus = await connect(url);
  const failures: unknown[] = [];
  let running: RunningService | undefined;
  await bus.service.announce({
    name: SERVICE_NAMES[service],
    version: VERSION,
    description: service,
    metadata: { instance: instanceId },
    stats: () => running?.stats?.() ?? null,
  });
  const log = createLogger({ level: 'silent', service, instance: instanceId });
  const registry = new Registry();
  const context: ServiceContext = {
    service,
    instanceId,
    config: readConfig(service, ['--nats-url', url, ...flags], {}),
    bus,
    log,
    registry,
    complain: createComplaints(log, registry),
    fail: (cause) => failures.push(cause),
  };
  const started = await start(context);
  running = started;
  return {
    context,
    running: started,
    failures,
    stop: async () => {
      await started.stop();
      await bus.close();
    },
    crash: async () => {
      await bus.connection.close();
      // Its timers must not outlive the test; nothing that this says reaches anybody.
      await started.stop();
    },
  };
}

export function connect(url: string): Promise<Bus> {
  return Bus.connect({ url, name: 'test', connectTimeoutMs: 5000 }, { onError: () => {} });
}

/** Waits until `probe` gives something, and returns it. */
export async function eventually<T>(probe: () => Promise<T | undefined> | T | undefined, timeoutMs = 5000): Promise<T> {
  const deadlineMs = performance.now() + timeoutMs;
  for (;;) {
    const value = await probe();
    if (value !== undefined) return value;
    if (performance.now() > deadlineMs) throw new Error(`not within ${timeoutMs} ms: ${probe}`);
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}
