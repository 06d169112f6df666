/**
 * Owns the judgement of one scenario: the load runs, the fault happens at random moments, every answer is compared.
 *
 * Invariants
 * 1. Whatever fails, load and faults have both ended when `judge` settles: nothing goes on in a cluster that stops.
 * 2. The seed and the name of the scenario give the moments, whichever scenarios run before it.
 */
import { ACK_WAIT_MS } from '@lamina/bus';
import type { ChaosCluster } from './chaos-cluster.ts';
import type { Cuts } from './clients/client.ts';
import { DurableClient } from './clients/durable.ts';
import { GenerateClient } from './clients/generate.ts';
import { HttpClient } from './clients/http.ts';
import { Random } from './random.ts';
import { type ChaosRow, percentiles } from './report.ts';
import { type ChaosRequest, sleep } from './requests.ts';
import type { Fault } from './scenarios.ts';
import { type Answers, Workload } from './workload.ts';

export interface Load {
  readonly requests: readonly ChaosRequest[];
  /** Their undisturbed answers. */
  readonly expected: Answers;
  readonly concurrency: number;
}

export interface Trial {
  readonly name: string;
  readonly seed: number;
  readonly numFaults: number;
  readonly cuts: Cuts;
  readonly fault: Fault;
}

const BUSY_TIMEOUT_MS = 10_000;
/**
 * Once a fault is made good and everything goes on, a sign of it can hardly come any more. Nobody waits for a request that has no
 * token yet, and what a dead executor had of those is taken up only when the queue has missed it.
 */
const LATE_SIGN_MS = ACK_WAIT_MS + 1_000;

/** Numbers of one scenario's own, from its seed and its name. */
export function randomOf({ name, seed }: Pick<Trial, 'name' | 'seed'>): Random {
  return new Random(seed ^ [...name].reduce((hash, char) => Math.imul(hash, 31) + char.charCodeAt(0), 7));
}

/** Runs the load while the fault happens `numFaults` times at random moments. */
export async function judge(tested: ChaosCluster, load: Load, trial: Trial): Promise<Omit<ChaosRow, 'seed' | 'form'>> {
  const { name, numFaults, cuts, fault } = trial;
  const startedMs = performance.now();
  const { bus } = tested.cluster;
  const clients = [
    new DurableClient(bus),
    new GenerateClient(bus, cuts),
    new HttpClient(() => tested.gatewayUrls(), cuts),
  ];
  const workload = await Workload.create(bus, load.requests, load.expected, clients);
  const random = randomOf(trial);
  const detectedMs: number[] = [];
  const resumedMs: number[] = [];
  let isOver = false;
  const makeFaults = async (): Promise<void> => {
    for (let made = 0; made < numFaults && !isOver; made++) {
      await sleep(random.between(100, 1_200));
      const busyByMs = performance.now() + BUSY_TIMEOUT_MS;
      while (workload.numRunning < load.concurrency / 2 && performance.now() < busyByMs) await sleep(20);
      await fault.ready?.(random);
      const delays = workload.watch();
      const sign = fault.sign?.();
      await fault.act(random);
      resumedMs.push(...(await delays()));
      const noticedMs = await sign?.within(LATE_SIGN_MS);
      if (noticedMs !== undefined) detectedMs.push(noticedMs);
    }
  };
  const end = (): void => {
    isOver = true;
  };
  const faults = makeFaults().finally(end);
  faults.catch(() => workload.giveUp());
  const answers = workload.run(name, load.concurrency, () => isOver).finally(end);
  const [made, answered] = await Promise.allSettled([faults, answers]);
  if (made.status === 'rejected') throw made.reason;
  if (answered.status === 'rejected') throw answered.reason;
  return {
    fault: name,
    ...answered.value,
    faults: numFaults,
    noticed: detectedMs.length,
    detectMs: percentiles(detectedMs),
    resumeMs: percentiles(resumedMs),
    seconds: Math.round((performance.now() - startedMs) / 1_000),
  };
}
