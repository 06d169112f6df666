/**
 * Owns the gateway's own series in /metrics.
 */
import { Counter, DURATION_BUCKETS_S, Gauge, Histogram, type Registry } from '@lamina/runtime';

export interface GatewayMetrics {
  /** Label `outcome`: stop, length, cancelled, or an error code. */
  readonly requests: Counter<'outcome'>;
  /** Label `outcome`: submitted, known, cancelled, or an error code. */
  readonly prompts: Counter<'outcome'>;
  readonly tokens: Counter;
  readonly repairs: Counter;
  /** Label `reason`: no_reply, bad_cancel_id. */
  readonly ignored: Counter<'reason'>;
  readonly timeToFirstTokenSeconds: Histogram;
  readonly interTokenSeconds: Histogram;
}

export interface GatewayCounts {
  readonly open: () => number;
  readonly waiting: () => number;
}

export function createGatewayMetrics(registry: Registry, counts: GatewayCounts): GatewayMetrics {
  const registers = [registry];
  new Gauge({
    name: 'lamina_gateway_open_requests',
    help: 'Requests that are being answered',
    registers,
    collect() {
      this.set(counts.open());
    },
  });
  new Gauge({
    name: 'lamina_gateway_waiting_requests',
    help: 'Requests and durable prompts that wait here for room in the work queue',
    registers,
    collect() {
      this.set(counts.waiting());
    },
  });
  return {
    requests: new Counter({
      name: 'lamina_gateway_requests_total',
      help: 'Answered requests by finish reason or error code',
      labelNames: ['outcome'],
      registers,
    }),
    prompts: new Counter({
      name: 'lamina_gateway_durable_prompts_total',
      help: 'Durable prompts by what became of them: submitted, known, cancelled, or an error code',
      labelNames: ['outcome'],
      registers,
    }),
    tokens: new Counter({ name: 'lamina_gateway_tokens_total', help: 'Tokens relayed to clients', registers }),
    repairs: new Counter({
      name: 'lamina_gateway_repairs_total',
      help: 'Times that an answer was looked for in the stream after a gap or a reconnection',
      registers,
    }),
    ignored: new Counter({
      name: 'lamina_gateway_ignored_total',
      help: 'Messages that nobody could be answered for',
      labelNames: ['reason'],
      registers,
    }),
    timeToFirstTokenSeconds: new Histogram({
      name: 'lamina_gateway_time_to_first_token_seconds',
      help: 'From the arrival of the prompt to its first token',
      buckets: DURATION_BUCKETS_S,
      registers,
    }),
    interTokenSeconds: new Histogram({
      name: 'lamina_gateway_inter_token_seconds',
      help: 'Between two messages of one answer, per token',
      buckets: DURATION_BUCKETS_S,
      registers,
    }),
  };
}
