/**
 * Owns metrics: one registry per process, answered over NATS, joined by a gateway.
 *
 * Invariants
 * 1. Every series has the labels service and instance, so joining registries never mixes processes.
 * 2. An answer that is none is left out; the others are still shown.
 * 3. The event-loop delay is that since the last scrape: a stall at start-up is not shown for ever.
 *    Counters of samples and of late ones say the same of any longer time.
 * 4. The event-loop delay is sampled densely while the process works, and once in WORK_CHECK_MS while it idles: the first
 *    stall after idle time may be seen in part, or not at all. The idle time itself is no delay.
 */
import { monitorEventLoopDelay } from 'node:perf_hooks';
import type { Bus } from '@lamina/bus';
import { packMessage, SUBJECTS, unpackMessage } from '@lamina/protocol';
import {
  AggregatorRegistry,
  Counter,
  Gauge,
  Histogram,
  type MetricObjectWithValues,
  type MetricValue,
  Registry,
} from 'prom-client';
import { z } from 'zod';

export { Counter, Gauge, Histogram, Registry };

export function createRegistry(service: string, instance: string): Registry {
  const registry = new Registry();
  registry.setDefaultLabels({ service, instance });
  observeEventLoop(registry);
  return registry;
}

/** Ten wake-ups a second while there is work. An idle process would spend half its time on them. */
const EVENT_LOOP_RESOLUTION_MS = 100;
/** Whether there is work is looked at so often. */
const WORK_CHECK_MS = 2_000;
/** A sample of the event-loop delay that is so late is counted as late. */
const LATE_MS = 50;
/** Part of the time in which the event loop ran something: heartbeats alone stay below. */
const WORK_UTILIZATION = 0.01;

function observeEventLoop(registry: Registry): void {
  const delays = monitorEventLoopDelay({ resolution: EVENT_LOOP_RESOLUTION_MS });
  delays.enable();
  let isSampled = true;
  let utilization = performance.eventLoopUtilization();
  let checkedAtMs = performance.now();
  let worstMs = 0;
  // The histogram holds whole intervals, of which the resolution is none of the delay.
  const lateMs = (ns: number): number => (delays.count === 0 ? 0 : Math.max(0, ns / 1e6 - EVENT_LOOP_RESOLUTION_MS));
  let numSamples = 0;
  let numLate = 0;
  const forget = (): void => {
    const { count } = delays;
    numSamples += count;
    for (let rank = count; rank > 0 && lateMs(delays.percentile((100 * rank) / count)) > LATE_MS; rank--) numLate++;
    delays.reset();
  };
  setInterval(() => {
    const nowMs = performance.now();
    worstMs = Math.max(worstMs, nowMs - checkedAtMs - WORK_CHECK_MS);
    checkedAtMs = nowMs;
    const current = performance.eventLoopUtilization();
    const isAtWork = performance.eventLoopUtilization(current, utilization).utilization >= WORK_UTILIZATION;
    utilization = current;
    if (isAtWork === isSampled) return;
    isSampled = isAtWork;
    if (!isAtWork) {
      delays.disable();
      return;
    }
    // Else Node would count the time since the last sample before as one interval.
    worstMs = Math.max(worstMs, lateMs(delays.max));
    forget();
    delays.enable();
  }, WORK_CHECK_MS).unref();
  const gauge: Gauge<'quantile'> = new Gauge({
    name: 'lamina_event_loop_delay_seconds',
    help: 'How late timers of the main thread were since the last scrape',
    labelNames: ['quantile'],
    registers: [registry],
    collect: () => {
      gauge.set({ quantile: '0.5' }, lateMs(delays.percentile(50)) / 1e3);
      gauge.set({ quantile: '0.99' }, lateMs(delays.percentile(99)) / 1e3);
      gauge.set({ quantile: '1' }, Math.max(lateMs(delays.max), worstMs) / 1e3);
      forget();
      worstMs = 0;
      samples.inc(numSamples);
      late.inc(numLate);
      numSamples = 0;
      numLate = 0;
    },
  });
  // Registered behind the gauge, which counts when it is collected.
  const samples = new Counter({
    name: 'lamina_event_loop_samples_total',
    help: 'How often the delay of the main thread was sampled',
    registers: [registry],
  });
  const late = new Counter({
    name: 'lamina_event_loop_late_samples_total',
    help: `Of those, how many were more than ${LATE_MS} ms late`,
    registers: [registry],
  });
}

/**
 * Answers a gateway's scrape. An endpoint of the announced service, alone in its queue group so that every instance
 * answers: $SRV.STATS carries the service's own facts per endpoint, and some services have no other.
 */
export function answerMetrics(bus: Bus, registry: Registry, onError: (cause: unknown) => void): void {
  bus.service.serveRaw('metrics', SUBJECTS.metrics, bus.service.instanceId, (message) => {
    const { reply } = message;
    if (reply === undefined) return;
    registry.getMetricsAsJSON().then((metrics) => bus.publish(reply, packMessage(metrics)), onError);
  });
}

type Metrics = MetricObjectWithValues<MetricValue<string>>[];

/** A gauge may be NaN or infinite, which zod's number is not. */
const isNumber = (value: unknown): boolean => typeof value === 'number';

const metricsSchema = z.array(
  z.looseObject({
    name: z.string(),
    help: z.string(),
    type: z.enum(['counter', 'gauge', 'histogram', 'summary']),
    aggregator: z.enum(['sum', 'first', 'min', 'max', 'average', 'omit']),
    values: z.array(z.looseObject({ value: z.custom<number>(isNumber), labels: z.record(z.string(), z.unknown()) })),
  }),
);

function readMetrics(answer: Uint8Array): Metrics[] {
  try {
    const value = unpackMessage(answer);
    return metricsSchema.safeParse(value).success ? [value as Metrics] : [];
  } catch {
    return [];
  }
}

/** Prometheus text of every instance that answers within `waitMs`. */
export async function collectMetrics(bus: Bus, waitMs: number): Promise<string> {
  const answers = (await bus.requestAll(SUBJECTS.metrics, waitMs)).flatMap(readMetrics);
  return AggregatorRegistry.aggregate(answers).metrics();
}

/** Buckets for durations in seconds, from 50 us to 10 s. */
export const DURATION_BUCKETS_S = [
  0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10,
];
