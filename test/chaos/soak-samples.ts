/**
 * Owns what a soak measures: memory and file descriptors of every process, size of the JetStream store, event-loop delay.
 *
 * Invariants
 * 1. Every process that runs at some sample is followed from then on, those included that are killed or take the place of
 *    others: what a service does in its first minutes is judged on them.
 * 2. Samples of a process's warm-up are kept and do not count; the warm-up of one that starts during the run is its own.
 * 3. Growth is that of what a process holds: once in COLLECT_EVERY samples (held-memory.ts). What is resident in
 *    between is shown, and not judged.
 */
import { readdirSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { SERVICE_NAMES } from '@lamina/protocol';
import type { Service } from '@lamina/runtime';
import { heldBytesOf, residentBytesOf } from '../memory/held-memory.ts';
import { growthPercent } from '../memory/trend.ts';
import type { ChaosCluster } from './chaos-cluster.ts';

const SERVICES: readonly Service[] = ['gateway', 'kv-manager', 'dense-executor', 'attention-shard'];
const SCRAPE_TIMEOUT_MS = 5_000;
const COLLECT_EVERY = 6;
const NATS_SERVER = 'nats-server';
/** A process that starts later only loads its model: the machine is warm. */
const LATE_WARM_UP_MS = 30_000;
/** One sample is no judgement. */
const MIN_SAMPLES = 3;
/**
 * What nats-server may have resident: itself, its connections and a quarter of what it stores. It keeps an index of its messages and
 * blocks that were written or read a short time ago, not the messages. With all streams full, 1.5 GiB, that is 480 MiB.
 */
const SERVER_BASE_MIB = 96;
const SERVER_SHARE_OF_STORE = 1 / 4;
const LOOP_LINE = /^lamina_event_loop_(delay_seconds|samples_total|late_samples_total)\{(.*)\} (\S+)$/gm;

interface Sample {
  readonly atMs: number;
  readonly residentBytes: number;
  /** The least that was resident during a full collection; undefined where none was asked for. */
  heldBytes: number | undefined;
  readonly numFiles: number;
  /** Undefined for nats-server, and where the scrape got no answer. */
  readonly loop: LoopSample | undefined;
}

/** Of the event loop. */
interface LoopSample {
  /** p99 since the sample before. */
  delayMs: number;
  /** Since the process started: how often the delay was sampled, and how often it was over 50 ms. */
  numSamples: number;
  numLate: number;
}

/** What the samples after the warm-up say of one process. */
export interface ProcessRow {
  readonly name: string;
  readonly numSamples: number;
  readonly residentMiB: { readonly first: number; readonly last: number };
  /** In full collections, with the time between the first and the last of them; undefined when there were too few. */
  readonly held: Held | undefined;
  readonly numFiles: { readonly first: number; readonly last: number };
  /** p99 of each window between two samples, ascending. */
  readonly loopDelaysMs: readonly number[];
  /** Samples of the event-loop delay after the first that counts, and those over 50 ms. */
  readonly loop: { readonly numSamples: number; readonly numLate: number };
}

/** nats-server when it had most memory compared with what it may have. */
export interface ServerMemory {
  readonly residentMiB: number;
  readonly storeMiB: number;
  readonly allowedMiB: number;
}

export interface Held {
  readonly spanMs: number;
  readonly firstMiB: number;
  readonly lastMiB: number;
  readonly allMiB: readonly number[];
  /** Of all of them, see test/memory/trend.ts. */
  readonly growthPercent: number;
}

export class Samples {
  readonly #tested: ChaosCluster;
  readonly #startedMs = performance.now();
  readonly #byPid = new Map<number, { readonly name: string; readonly samples: Sample[] }>();
  readonly #storeBytes: number[] = [];
  #server: ServerMemory | undefined;
  #numTaken = 0;

  constructor(tested: ChaosCluster) {
    this.#tested = tested;
  }

  /** Every process that runs now, by process id. */
  #running(): Map<number, string> {
    const { cluster, natsPid } = this.#tested;
    const children = SERVICES.flatMap((service) => cluster.processes(service)).filter((child) => child.isRunning);
    const named = children.flatMap(({ name, pid }): [number, string][] => (pid === undefined ? [] : [[pid, name]]));
    return new Map(natsPid === undefined ? named : [...named, [natsPid, NATS_SERVER]]);
  }

  async take(): Promise<void> {
    const loops = await this.#loops();
    const atMs = performance.now() - this.#startedMs;
    for (const [pid, name] of this.#running()) {
      const measured = measure(pid);
      if (measured === undefined) continue;
      const followed = this.#byPid.get(pid) ?? { name, samples: [] };
      this.#byPid.set(pid, followed);
      followed.samples.push({ atMs, ...measured, heldBytes: undefined, loop: loops.get(pid) });
      if (name === NATS_SERVER) this.#noteServer(measured.residentBytes);
    }
    if (++this.#numTaken % COLLECT_EVERY === 0) await this.#collect();
  }

  #noteServer(residentBytes: number): void {
    const storeBytes = bytesUnder(this.#tested.storeDir);
    this.#storeBytes.push(storeBytes);
    const [residentMiB, storeMiB] = [mebibytes(residentBytes), mebibytes(storeBytes)];
    const allowedMiB = SERVER_BASE_MIB + storeMiB * SERVER_SHARE_OF_STORE;
    const former = this.#server;
    if (former === undefined || residentMiB - allowedMiB > former.residentMiB - former.allowedMiB)
      this.#server = { residentMiB, storeMiB, allowedMiB };
  }

  get server(): ServerMemory | undefined {
    return this.#server;
  }

  /** Lets every process collect its heaps, and notes in its last sample the least that is resident meanwhile. */
  async #collect(): Promise<void> {
    const held = await heldBytesOf([...this.#running()].flatMap(([pid, name]) => (name === NATS_SERVER ? [] : [pid])));
    for (const [pid, bytes] of held) {
      const last = this.#byPid.get(pid)?.samples.at(-1);
      if (last !== undefined) last.heldBytes = bytes;
    }
  }

  /** By process id, as the gateway that lives through the run shows it to Prometheus. */
  async #loops(): Promise<ReadonlyMap<number, LoopSample>> {
    const { bus, httpUrl } = this.#tested.cluster;
    const loops = new Map<number, LoopSample>();
    const [reply, ...stats] = await Promise.all([
      fetch(`${httpUrl}/metrics`, { signal: AbortSignal.timeout(SCRAPE_TIMEOUT_MS) }),
      ...SERVICES.map((service) => bus.serviceStats(SERVICE_NAMES[service], 500)),
    ]);
    const pids = new Map(stats.flat().map(({ metadata }) => [metadata.instance, Number(metadata.pid)]));
    for (const [, what, labels = '', value] of (await reply.text()).matchAll(LOOP_LINE)) {
      const instance = /instance="([^"]*)"/.exec(labels)?.[1];
      const pid = pids.get(instance);
      if (pid === undefined) continue;
      const loop = loops.get(pid) ?? { delayMs: 0, numSamples: 0, numLate: 0 };
      loops.set(pid, loop);
      if (what === 'samples_total') loop.numSamples = Number(value);
      else if (what === 'late_samples_total') loop.numLate = Number(value);
      else if (labels.includes('quantile="0.99"')) loop.delayMs = Number(value) * 1_000;
    }
    return loops;
  }

  /** In the order of their start; without those that ended before they had samples that count. */
  rows(warmUpMs: number): ProcessRow[] {
    const firstMs = Math.min(...[...this.#byPid.values()].map(({ samples }) => samples[0]!.atMs));
    return [...this.#byPid.values()].flatMap(({ name, samples }) => {
      const startMs = samples[0]!.atMs;
      const fromMs = startMs === firstMs ? warmUpMs : Math.max(warmUpMs, startMs + LATE_WARM_UP_MS);
      const counted = samples.filter(({ atMs }) => atMs >= fromMs);
      const [first, last] = [counted[0], counted.at(-1)];
      if (first === undefined || last === undefined || counted.length < MIN_SAMPLES) return [];
      const loops = counted.flatMap(({ loop }) => (loop === undefined ? [] : [loop]));
      const [firstLoop, lastLoop] = [loops[0], loops.at(-1)];
      const since = (key: 'numSamples' | 'numLate'): number => (lastLoop?.[key] ?? 0) - (firstLoop?.[key] ?? 0);
      return [
        {
          name,
          numSamples: counted.length,
          residentMiB: { first: mebibytes(first.residentBytes), last: mebibytes(last.residentBytes) },
          held: heldOf(counted),
          numFiles: { first: first.numFiles, last: last.numFiles },
          loopDelaysMs: loops.map(({ delayMs }) => delayMs).sort((a, b) => a - b),
          loop: { numSamples: since('numSamples'), numLate: since('numLate') },
        },
      ];
    });
  }

  get storeMiB(): { readonly first: number; readonly last: number } {
    return { first: mebibytes(this.#storeBytes[0] ?? 0), last: mebibytes(this.#storeBytes.at(-1) ?? 0) };
  }
}

const mebibytes = (bytes: number): number => Math.round((bytes / 1024 / 1024) * 10) / 10;

function heldOf(samples: readonly Sample[]): Held | undefined {
  const points = samples.flatMap(({ atMs, heldBytes }) => (heldBytes === undefined ? [] : [{ atMs, heldBytes }]));
  const [first, last] = [points[0], points.at(-1)];
  if (first === undefined || last === undefined || points.length < MIN_SAMPLES) return undefined;
  const spanMs = last.atMs - first.atMs;
  return {
    spanMs,
    firstMiB: mebibytes(first.heldBytes),
    lastMiB: mebibytes(last.heldBytes),
    allMiB: points.map(({ heldBytes }) => mebibytes(heldBytes)),
    growthPercent: growthPercent(points.map(({ atMs, heldBytes }) => ({ atMs, value: heldBytes }))),
  };
}

/** Undefined when the process is gone. */
function measure(pid: number): Pick<Sample, 'residentBytes' | 'numFiles'> | undefined {
  const residentBytes = residentBytesOf(pid);
  try {
    return residentBytes === undefined ? undefined : { residentBytes, numFiles: readdirSync(`/proc/${pid}/fd`).length };
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
