/**
 * Owns the metrics of the executor.
 */
import { Counter, DURATION_BUCKETS_S, Gauge, Histogram, type Registry } from '@lamina/runtime';
import type { StepTimings } from './worker/messages.ts';

const STEP_PARTS = ['dense', 'wait', 'codec', 'sample', 'schedule', 'machine', 'total'] as const;
export type StepPart = (typeof STEP_PARTS)[number];

export class ExecutorMetrics {
  readonly generatedTokens: Counter;
  readonly prefilledTokens: Counter;
  readonly draftedTokens: Counter;
  readonly acceptedTokens: Counter;
  readonly steps: Counter;
  readonly failedSteps: Counter<'code'>;
  readonly abortedSteps: Counter;
  readonly recoveries: Counter;
  readonly preemptions: Counter;
  readonly requests: Counter<'finish_reason'>;
  /** Label `reason`: bad_cancel_id. */
  readonly ignored: Counter<'reason'>;
  readonly #parts: Map<StepPart, { observe(seconds: number): void }>;

  constructor(registry: Registry, current: { running: () => number; waves: () => number }) {
    const registers = [registry];
    this.generatedTokens = new Counter({ name: 'lamina_generated_tokens_total', help: 'Tokens sampled', registers });
    this.prefilledTokens = new Counter({
      name: 'lamina_prefilled_tokens_total',
      help: 'Prompt tokens computed, those computed again included',
      registers,
    });
    this.draftedTokens = new Counter({
      name: 'lamina_drafted_tokens_total',
      help: 'Tokens that were guessed from the context and verified',
      registers,
    });
    this.acceptedTokens = new Counter({
      name: 'lamina_accepted_tokens_total',
      help: 'Guessed tokens that were right',
      registers,
    });
    this.steps = new Counter({ name: 'lamina_steps_total', help: 'Steps that were completed', registers });
    this.failedSteps = new Counter({
      name: 'lamina_failed_steps_total',
      help: 'Steps that were given up',
      labelNames: ['code'],
      registers,
    });
    this.abortedSteps = new Counter({
      name: 'lamina_aborted_steps_total',
      help: 'Steps that were ended early because requests in them had ended',
      registers,
    });
    this.recoveries = new Counter({
      name: 'lamina_recoveries_total',
      help: 'Requests whose KV was lost and computed again',
      registers,
    });
    this.preemptions = new Counter({
      name: 'lamina_preemptions_total',
      help: 'Requests that gave up their KV to older ones',
      registers,
    });
    this.requests = new Counter({
      name: 'lamina_requests_total',
      help: 'Requests that ended',
      labelNames: ['finish_reason'],
      registers,
    });
    this.ignored = new Counter({
      name: 'lamina_executor_ignored_total',
      help: 'Messages that are for no request',
      labelNames: ['reason'],
      registers,
    });
    new Gauge({
      name: 'lamina_running_requests',
      help: 'Requests on this executor',
      registers,
      collect() {
        this.set(current.running());
      },
    });
    new Gauge({
      name: 'lamina_waves_in_flight',
      help: 'Waves with a step in flight',
      registers,
      collect() {
        this.set(current.waves());
      },
    });
    const seconds = new Histogram({
      name: 'lamina_step_seconds',
      help: 'Time of one step by cause: dense stages, waiting for attention, tensor codec, sampling, scheduling, request state machines, total',
      labelNames: ['part'],
      buckets: DURATION_BUCKETS_S,
      registers,
    });
    this.#parts = new Map(STEP_PARTS.map((part) => [part, seconds.labels({ part })]));
  }

  observe(part: StepPart, ms: number): void {
    this.#parts.get(part)?.observe(ms / 1000);
  }

  observeStep(timings: StepTimings): void {
    this.steps.inc();
    this.observe('dense', timings.denseMs);
    this.observe('wait', timings.waitMs);
    this.observe('codec', timings.codecMs);
    this.observe('sample', timings.sampleMs);
    this.observe('total', timings.totalMs);
  }
}
