/** The gateway process. */
import { runService } from '@lamina/runtime';
import { startGateway } from './service.ts';

await runService('gateway', 'The edge: prompts in, tokens out', startGateway);
