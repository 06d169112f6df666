/** Process life: the only package that reads process.env. */
export { type Complain, createComplaints, MAX_PER_WINDOW, WINDOW_MS } from './complaints.ts';
export { natsServerOf, processEnvironment, readConfig } from './config.ts';
export { HUB_VARIABLES, hubVariables } from './hub-access.ts';
export { createLogger, type Logger } from './log.ts';
export { Counter, collectMetrics, DURATION_BUCKETS_S, Gauge, Histogram, Registry } from './metrics.ts';
export { natsAccessOf } from './nats-access.ts';
export { createInstanceId, type RunningService, runService, type ServiceContext } from './service.ts';
export {
  type Config,
  flagOf,
  LAUNCHER_VARIABLES,
  SERVICES,
  SETTINGS,
  type Service,
  type SettingName,
} from './settings.ts';
export { makeRoomForTensors } from './tensor-heap.ts';
