/**
 * Owns what a soak measures: memory and file descriptors of every process, size of the JetStream store, event-loop delay.
 *
 * Invariants
 * 1. A process is judged if it lived through the whole run; one that was killed, or took the place of another, is not.
 * 2. Samples of the warm-up are kept and do not count.
 */
import { readdirSync, readFileSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { SERVICE_NAMES } from '@lamina/protocol';
import type { Service } from '@lamina/runtime';
import type { ChaosCluster } from './chaos-cluster.ts';

const SERVICES: readonly Service[] = ['gateway', 'kv-manager', 'dense-executor', 'attention-shard'];
const SCRAPE_TIMEOUT_MS = 5_000;
const DELAY_LINE = /^lamina_event_loop_delay_seconds\{(.*)\} (\S+)$/gm;

interface Sample {
  readonly atMs: number;
  readonly residentBytes: number;
  readonly numFiles: number;
  /** p99 since the sample before; undefined for nats-server, and where the scrape got no answer. */
  readonly loopDelayMs: number | undefined;
}

/** What the samples after the warm-up say of one process. */
export interface ProcessRow {
  readonly name: string;
  readonly numSamples: number;
  readonly residentMiB: { readonly first: number; readonly last: number };
  /** The line of least squares through the samples: what it rises over their time, in percent of its start. */
  readonly growthPercent: number;
  readonly numFiles: { readonly first: number; readonly last: number };
  /** Of the windows between two samples, each with its p99. */
  readonly loopDelayMs: { readonly median: number; readonly worst: number } | undefined;
}

export class Samples {
  readonly #tested: ChaosCluster;
  readonly #startedMs = performance.now();
  readonly #byName = new Map<string, { pid: number; samples: Sample[] }>();
  readonly #storeBytes: number[] = [];

  /** Follows the processes that run now. */
  constructor(tested: ChaosCluster) {
    this.#tested = tested;
    const children = SERVICES.flatMap((service) => tested.cluster.processes(service));
    for (const { name, pid } of children) if (pid !== undefined) this.#byName.set(name, { pid, samples: [] });
    if (tested.natsPid !== undefined) this.#byName.set('nats-server', { pid: tested.natsPid, samples: [] });
  }

  async take(): Promise<void> {
    const delays = await this.#loopDelays();
    const atMs = performance.now() - this.#startedMs;
    for (const { pid, samples } of this.#byName.values()) {
      const residentBytes = residentBytesOf(pid);
      if (residentBytes === undefined) continue;
      const numFiles = readdirSync(`/proc/${pid}/fd`).length;
      samples.push({ atMs, residentBytes, numFiles, loopDelayMs: delays.get(pid) });
    }
    this.#storeBytes.push(bytesUnder(this.#tested.storeDir));
  }

  /** p99 in ms by process id, as the gateway that lives through the run shows it to Prometheus. */
  async #loopDelays(): Promise<ReadonlyMap<number, number>> {
    const { bus, httpUrl } = this.#tested.cluster;
    const delays = new Map<number, number>();
    const [reply, ...stats] = await Promise.all([
      fetch(`${httpUrl}/metrics`, { signal: AbortSignal.timeout(SCRAPE_TIMEOUT_MS) }),
      ...SERVICES.map((service) => bus.serviceStats(SERVICE_NAMES[service], 500)),
    ]);
    const pids = new Map(stats.flat().map(({ metadata }) => [metadata.instance, Number(metadata.pid)]));
    for (const [, labels = '', value] of (await reply.text()).matchAll(DELAY_LINE)) {
      const instance = /instance="([^"]*)"/.exec(labels)?.[1];
      const pid = pids.get(instance);
      if (pid !== undefined && labels.includes('quantile="0.99"')) delays.set(pid, Number(value) * 1_000);
    }
    return delays;
  }

  /** In the order of their start; without those that ended. */
  rows(warmUpMs: number): ProcessRow[] {
    return [...this.#byName].flatMap(([name, { pid, samples }]) => {
      const counted = samples.filter(({ atMs }) => atMs >= warmUpMs);
      const [first, last] = [counted[0], counted.at(-1)];
      if (residentBytesOf(pid) === undefined || first === undefined || last === undefined) return [];
      const delays = counted.flatMap(({ loopDelayMs }) => (loopDelayMs === undefined ? [] : [loopDelayMs]));
      delays.sort((a, b) => a - b);
      return [
        {
          name,
          numSamples: counted.length,
          residentMiB: { first: mebibytes(first.residentBytes), last: mebibytes(last.residentBytes) },
          growthPercent: growthPercent(counted),
          numFiles: { first: first.numFiles, last: last.numFiles },
          loopDelayMs:
            delays.length === 0 ? undefined : { median: delays[Math.floor(delays.length / 2)]!, worst: delays.at(-1)! },
        },
      ];
    });
  }

  get storeMiB(): { readonly first: number; readonly last: number } {
    return { first: mebibytes(this.#storeBytes[0] ?? 0), last: mebibytes(this.#storeBytes.at(-1) ?? 0) };
  }
}

const mebibytes = (bytes: number): number => Math.round((bytes / 1024 / 1024) * 10) / 10;

function growthPercent(samples: readonly Sample[]): number {
  const meanMs = samples.reduce((sum, { atMs }) => sum + atMs, 0) / samples.length;
  const meanBytes = samples.reduce((sum, { residentBytes }) => sum + residentBytes, 0) / samples.length;
  let covariance = 0;
  let variance = 0;
  for (const { atMs, residentBytes } of samples) {
    covariance += (atMs - meanMs) * (residentBytes - meanBytes);
    variance += (atMs - meanMs) ** 2;
  }
  if (variance === 0) return 0;
  const bytesPerMs = covariance / variance;
  const startBytes = meanBytes + bytesPerMs * (samples[0]!.atMs - meanMs);
  return ((bytesPerMs * (samples.at(-1)!.atMs - samples[0]!.atMs)) / startBytes) * 100;
}

/** Undefined when the process is gone. */
function residentBytesOf(pid: number): number | undefined {
  try {
    const kilobytes = /^VmRSS:\s+(\d+) kB$/m.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1];
    return kilobytes === undefined ? undefined : Number(kilobytes) * 1024;
  } catch {
    return undefined;
  }
}

/** Files come and go while they are counted. */
function bytesUnder(directory: string): number {
  let bytes = 0;
  for (const entry of readdirSync(directory, { withFileTypes: true, recursive: true })) {
    if (!entry.isFile()) continue;
    bytes += statSync(join(entry.parentPath, entry.name), { throwIfNoEntry: false })?.size ?? 0;
  }
  return bytes;
}
