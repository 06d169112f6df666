/**
 * Owns `lamina healthcheck <service>`: is the service on this host well? For containers.
 *
 * Invariants
 * 1. It answers within HEALTHCHECK_TIMEOUT_MS, once, without retries.
 * 2. It loads what it needs and no more: the gateway is asked over HTTP, without the bus.
 * 3. Only an instance that says it runs on this host counts: another container's health is not ours.
 */
import { hostname } from 'node:os';
import { natsAccessOf, readConfig, type Service } from '@lamina/runtime/config';
import { LaminaError } from '@lamina/tensor';
import { readHealth } from './health.ts';

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
    const error = new LaminaError('unavailable', `no ${service} on this host answers on NATS`);
    timer = setTimeout(() => reject(error), HEALTHCHECK_TIMEOUT_MS);
  });
  await Promise.race([requireInstance(service, config.natsUrl, natsAccessOf(config, service)), timeout]);
  clearTimeout(timer);
}

async function requireInstance(
  service: Service,
  natsUrl: string,
  access: ReturnType<typeof natsAccessOf>,
): Promise<void> {
  const [{ Bus }, { SERVICE_NAMES }] = await Promise.all([import('@lamina/bus'), import('@lamina/protocol')]);
  const bus = await Bus.connect(
    { url: natsUrl, name: 'lamina healthcheck', connectTimeoutMs: 0, access },
    { onError: () => undefined },
  );
  const instances = await bus.serviceStats(SERVICE_NAMES[service], HEALTHCHECK_TIMEOUT_MS / 4);
  await bus.close();
  if (!instances.some(({ metadata }) => metadata.host === hostname())) {
    throw new LaminaError('unavailable', `no ${service} on this host answers on NATS`);
  }
}
