// What personalisation is worth: each level against the one below, with intervals, and the weeks behind it.
import { call } from '../api.js';
import { html, useEffect, useState } from '../parts/html.js';
import { Notice, Says } from '../parts/widgets.js';
import { count, figure, percent, titled } from '../parts/words.js';

const METRICS = {
	changed: ['Text changed', 'less text changed'],
	sent: ['Sent as they are', 'more answers sent as they are'],
	discarded: ['Discarded', 'fewer answers discarded'],
	up: ['Ratings up', 'more ratings up'],
	silent: ['Without feedback', 'fewer answers without feedback'],
};
const MORE_IS_BETTER = ['sent', 'up'];
const WIDE = 240;

export function Worth() {
	const [worth, setWorth] = useState(null);
	const [fault, setFault] = useState(null);
	const look = () => call('GET', '/worth').then((told) => { setWorth(told); setFault(null); }, setFault);
	useEffect(() => { look(); }, []);
	return html`
		<h1 tabindex="-1">Worth</h1>
		<p class="lead">A share of users is answered one level lower for a week. What they do with these answers shows what
			the level is worth.</p>
		<${Notice} error=${fault} again=${look} />
		${!worth && !fault && html`<p class="dim" role="status">Looking …</p>`}
		${worth && html`
			<section class="card" aria-label="Results">
				<h2>Is it worth it?</h2>
				<ul class="stack">${worth.says.map((words) => html`<li key=${words}><${Says} text=${words} /></li>`)}</ul>
				${worth.running.map(({ week, people }) => html`<p key=${week} class="hint">
					Week of ${week}: ${count(people, 'person', 'people')} so far, counted once it is over.</p>`)}
			</section>
			<div class="pair even">${grouped(worth.comparisons).map((group) => html`
				<${Comparisons} key=${group[0].level + group[0].holdout} group=${group} />`)}</div>
			${worth.weeks.length > 0 && html`<${Weeks} weeks=${worth.weeks} />`}`}`;
}

/** The comparisons of each level and share of users held out. */
function grouped(comparisons) {
	const name = ({ level, holdout }) => `${level} ${holdout}`;
	return [...new Set(comparisons.map(name))].map((group) => comparisons.filter((one) => name(one) === group));
}

function Comparisons({ group }) {
	const [{ level, holdout }] = group;
	const known = group.filter(({ difference }) => difference).map(better);
	const most = Math.max(0.01, ...known.flatMap(({ low, high }) => [Math.abs(low), Math.abs(high)]));
	return html`<section class="card" aria-label=${`Comparisons of ${level}`}>
		<h2>${titled(level)} against one level lower</h2>
		<ul class="intervals">${group.map((one) => html`<li key=${one.metric}>
			<span>${METRICS[one.metric][0]}</span>
			${one.difference
				? html`<${Picture} ...${better(one)} most=${most} />`
				: html`<span class="dim">too few people yet</span>`}
			<span class="hint">${shares(one)}</span>
		</li>`)}</ul>
		<p class="hint">${known.length > 0 && `Right of the line, ${level} is better. A bar that does not touch the line is sure (95 %, at
			any time). The picture ends at ${figure(most * 100)} points. `}${percent(holdout)} of users are held out.</p>
	</section>`;
}

/** The difference of a comparison in favour of the level. */
function better({ metric, difference: { estimate, low, high } }) {
	return MORE_IS_BETTER.includes(metric) ? { metric, estimate: -estimate, low: -high, high: -low } : { metric, estimate, low, high };
}

function shares({ lower, full }) {
	const mean = ({ mean: value, people_weeks: weeks }) => `${value === null ? '–' : percent(value)} of ${figure(weeks)}`;
	return `one level lower ${mean(lower)}, full ${mean(full)} people-weeks`;
}

function Picture({ metric, estimate, low, high, most }) {
	const x = (value) => (WIDE / 2) * (1 + (0.96 * value) / most);
	const sure = low > 0 || high < 0;
	const said = `${figure(estimate * 100)} points ${METRICS[metric][1]}, from ${figure(low * 100)} to ${figure(high * 100)}`;
	return html`<svg class=${sure ? 'interval sure' : 'interval'} viewBox=${`0 0 ${WIDE} 16`} role="img" aria-label=${said}>
		<line class="zero" x1=${WIDE / 2} x2=${WIDE / 2} y1="0" y2="16" />
		<line class="ends" x1=${x(low)} x2=${x(high)} y1="8" y2="8" />
		<circle cx=${x(estimate)} cy="8" r="4" />
	</svg>`;
}

function Weeks({ weeks }) {
	const names = Object.keys(METRICS);
	return html`<section class="card" aria-label="Weeks">
		<h2>Weeks</h2>
		<div class="scroll" tabindex="0" role="region" aria-label="What happened in each week">
			<table class="wide">
				<thead><tr>${['Week', 'Level', 'Arm', 'People', 'Answers', ...names.map((name) => METRICS[name][0])].map((title) => html`
					<th key=${title} scope="col">${title}</th>`)}</tr></thead>
				<tbody>${weeks.map((row) => html`<tr key=${row.week + row.level + row.arm + row.holdout}>
					<th scope="row">${row.week}</th><td>${row.level}</td><td>${row.arm}</td>
					<td class="figure">${figure(row.people)}</td><td class="figure">${figure(row.answers)}</td>
					${names.map((name) => html`<td key=${name} class="figure">${name in row.shares ? percent(row.shares[name]) : '–'}</td>`)}
				</tr>`)}</tbody>
			</table>
		</div>
	</section>`;
}
