// The figures of the System page: rates over the last minute, and the current engines and jobs.
import { growth, quantile, total } from '../reading/metrics.js';
import { html } from './html.js';
import { figure, milliseconds } from './words.js';

const WINDOW_MS = 60_000;
const REQUESTS = 'mta_requests_total';
const OWN = /^\/($|ready|health|metrics|bank|worth|console)/; // requests of the console and of probes
const others = ({ route }) => !OWN.test(route);
const answers = ({ level }) => Boolean(level);
const of = (name, value) => (labels) => labels[name] === value;

export function Figures({ readings }) {
	const now = readings.at(-1);
	const then = readings.find(({ at }) => at >= now.at - WINDOW_MS);
	const seconds = (now.at - then.at) / 1000;
	const perSecond = (passes) => {
		const grown = seconds ? growth(then, now, REQUESTS, passes) : null;
		return [[grown === null ? '–' : figure(grown / seconds), 'a second']];
	};
	const quantiles = (name) => [0.5, 0.99].map((q) => {
		const value = quantile(then, now, name, q);
		return [milliseconds(value === null ? null : value * 1000), `p${q * 100}`];
	});
	const states = (name, label, values, read) => values.map((value) => [shown(read(name, of(label, value))), value]);
	const sum = (name, passes) => total(now, name, passes);
	return html`<div class="tiles">
		<${Tile} name="Requests" values=${perSecond(others)} spark=${rates(readings, others)} />
		<${Tile} name="Answers" values=${perSecond(answers)} spark=${rates(readings, answers)} />
		<${Tile} name="First token" values=${quantiles('mta_ttft_seconds')} />
		<${Tile} name="Between tokens" values=${quantiles('mta_inter_token_seconds')} />
		<${Tile} name="Adapter slots" values=${[[shown(sum('mta_engine_slots_resident')), `of ${shown(sum('mta_engine_slots'))} resident`]]} />
		<${Tile} name="Adapters asked for"
			values=${states('mta_engine_prepares_total', 'kind', ['warm', 'cold'], (name, passes) => growth(then, now, name, passes))} />
		<${Tile} name="Training jobs" values=${states('mta_jobs', 'state', ['queued', 'running'], sum)} />
		${quotas(now).length > 0 && html`<${Tile} name="Quotas" values=${quotas(now)} />`}
	</div>`;
}

/** What tenants have used of their quotas, as values of a tile. */
const quotas = ({ samples }) => (samples.get('mta_tenant_quota') ?? []).map(({ labels: { tenant, quota }, value }, place) => {
	const used = samples.get('mta_tenant_used')[place].value; // in the same order
	return [figure(used), `of ${figure(value)} ${quota === 'tokens' ? 'tokens a day' : quota}, ${tenant}`];
});

const shown = (value) => (value === null ? '–' : figure(value));

const Tile = ({ name, values, spark }) => html`<section class=${spark ? 'card tile broader' : 'card tile'} aria-label=${name}>
	<h2>${name}</h2>
	<p>${values.map(([value, unit]) => html`<span key=${unit}><b>${value}</b> ${unit}</span>`)}</p>
	${spark && html`<${Spark} values=${spark} />`}
</section>`;

/** Growth per second between neighbouring readings. */
const rates = (readings, passes) => readings.slice(1).map((reading, index) => {
	const before = readings[index];
	return (growth(before, reading, REQUESTS, passes) ?? 0) / ((reading.at - before.at) / 1000);
});

function Spark({ values }) {
	const most = Math.max(...values, 0.001);
	const points = values.map((value, index) => `${(index / Math.max(1, values.length - 1)) * 100},${29 - 28 * (value / most)}`);
	return html`<svg class="spark" viewBox="0 0 100 30" preserveAspectRatio="none" aria-hidden="true">
		<polyline points=${points.join(' ')} />
	</svg>`;
}
