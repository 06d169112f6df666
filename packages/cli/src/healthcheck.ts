/**
 * Owns `lamina healthcheck <service>`: is the service on this host well? For containers.
 *
 * Invariants
 * 1. It answers within HEALTHCHECK_TIMEOUT_MS, once, without retries.
 * 2. Only an instance that says it runs on this host counts: another container's health is not ours.
 */
import { hostname } from 'node:os';
import { Bus } from '@lamina/bus';
import { SERVICE_NAMES } from '@lamina/protocol';
import { readConfig, type Service } from '@lamina/runtime';
import { LaminaError } from '@lamina/tensor';
import { readHealth } from './probes.ts';

const HEALTHCHECK_TIMEOUT_MS = 2_000;

/** @throws LaminaError `unavailable` and the reason when it is not well. */
export async function checkHealth(
  service: Service,
  environment: Readonly<Record<string, string | undefined>>,
): Promise<void> {
  const config = readConfig(service, [], environment);
  if (service === 'gateway') {
    const host = config.httpHost === '0.0.0.0' ? '127.0.0.1' : config.httpHost;
    const health = await readHealth(`http://${host}:${config.httpPort}`, HEALTHCHECK_TIMEOUT_MS);
    if (!health.isReady) throw new LaminaError('unavailable', health.reason);
    return;
  }
  let timer: NodeJS.Timeout | undefined;
  const timeout = new Promise<never>((_, reject) => {
    const error = new LaminaError('unavailable', `no ${service} on this host answers at ${config.natsUrl}`);
    timer = setTimeout(() => reject(error), HEALTHCHECK_TIMEOUT_MS);
  });
  await Promise.race([requireInstance(service, config.natsUrl), timeout]);
  clearTimeout(timer);
}

async function requireInstance(service: Service, natsUrl: string): Promise<void> {
  const bus = await Bus.connect(
    { url: natsUrl, name: 'lamina healthcheck', connectTimeoutMs: 0 },
    { onError: () => undefined },
  );
  const instances = await bus.serviceStats(SERVICE_NAMES[service], HEALTHCHECK_TIMEOUT_MS / 4);
  await bus.close();
  if (!instances.some(({ metadata }) => metadata.host === hostname())) {
    throw new LaminaError('unavailable', `no ${service} on this host answers at ${natsUrl}`);
  }
}
