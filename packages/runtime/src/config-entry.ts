/** Configuration alone, for commands that must start quickly: loads neither the bus nor logging nor metrics. */
export { processEnvironment, readConfig } from './config.ts';
export { natsAccessOf } from './nats-access.ts';
export { SERVICES, type Service } from './settings.ts';
export { VERSION } from './version.ts';
