#include "statistics.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

namespace deploycc {

namespace {

constexpr double confidence = 0.95, pi = 3.14159265358979323846;

// Share of Student's t below `t` for whole degrees of freedom (Abramowitz & Stegun 26.7.3 and 26.7.4).
double student_cdf(double t, int freedom) {
  const double angle = std::atan2(t, std::sqrt(freedom)), sine = std::sin(angle), square = std::pow(std::cos(angle), 2);
  const int odd = freedom % 2;
  double term = odd ? std::cos(angle) : 1.0, total = term;
  for (int step = 2 + odd; step < freedom; step += 2) {
    term *= square * (step - 1) / step;
    total += term;
  }
  const double inside = odd ? 2 / pi * (angle + (freedom > 1 ? sine * total : 0.0)) : sine * total;
  return 0.5 + inside / 2;
}

double student_quantile(int freedom) {
  double low = 0, high = 1e6;
  for (int i = 0; i < 80; ++i) {
    const double middle = (low + high) / 2;
    (student_cdf(middle, freedom) < (1 + confidence) / 2 ? low : high) = middle;
  }
  return (low + high) / 2;
}

// How many cosine transforms are averaged: fewer where neighbours are correlated, so that only slow waves count.
int transforms(const std::vector<double>& centered) {
  const auto count = static_cast<double>(centered.size());
  const int usual = std::max(2, static_cast<int>(std::nearbyint(0.4 * std::pow(count, 2.0 / 3))));
  const double power = std::inner_product(centered.begin(), centered.end(), centered.begin(), 0.0);
  double alike = power > 0 ? std::inner_product(centered.begin() + 1, centered.end(), centered.begin(), 0.0) / power : 0.0;
  alike += (1 + 3 * alike) / count;  // the estimate is too low by that much (Kendall 1954)
  if (alike < 2 / std::sqrt(count)) return std::min(usual, static_cast<int>(count) - 1);
  return std::max(2, std::min(usual, static_cast<int>(std::nearbyint(1.3 * usual * (1 - alike)))));
}

// Standard error of the mean of a series whose neighbours are alike, and its degrees of freedom.
std::pair<double, int> standard_error(std::vector<double> values) {
  const size_t count = values.size();
  if (count < 3) return {std::numeric_limits<double>::infinity(), 1};
  const double mean = std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(count);
  for (double& value : values) value -= mean;
  const int used = transforms(values);
  double squares = 0;
  for (int wave = 1; wave <= used; ++wave) {
    double sum = 0;
    for (size_t i = 0; i < count; ++i) sum += std::cos(pi * wave * (static_cast<double>(i) + 0.5) / static_cast<double>(count)) * values[i];
    squares += 2 / static_cast<double>(count) * sum * sum;
  }
  return {std::sqrt(squares / used / static_cast<double>(count)), used};
}

// Standard error of the mean of one figure per session, and its degrees of freedom.
std::pair<double, int> error_over_sessions(const std::vector<double>& values, const std::vector<size_t>& openings) {
  std::vector<double> means;
  for (size_t part = 0; part < openings.size(); ++part) {
    const size_t end = part + 1 < openings.size() ? openings[part + 1] : values.size();
    const auto first = values.begin() + static_cast<ptrdiff_t>(openings[part]), last = values.begin() + static_cast<ptrdiff_t>(end);
    means.push_back(std::accumulate(first, last, 0.0) / static_cast<double>(last - first));
  }
  const auto count = static_cast<double>(means.size());
  const double mean = std::accumulate(means.begin(), means.end(), 0.0) / count;
  double squares = 0;
  for (const double value : means) squares += (value - mean) * (value - mean);
  return {std::sqrt(squares / (count - 1) / count), static_cast<int>(means.size()) - 1};
}

// 95 % interval of the median: that of each round's share of calls below it, read back through the sorted times (Woodruff 1952).
std::pair<double, double> median_interval(const Samples& samples, const std::vector<double>& sorted) {
  const double found = quantile(sorted, 0.5);
  std::vector<double> below;
  for (size_t first = 0; first + samples.per_round <= samples.ns.size(); first += samples.per_round) {
    double share = 0;
    for (size_t i = first; i < first + samples.per_round; ++i) {
      const auto time = static_cast<double>(samples.ns[i]);
      share += time < found ? 1.0 : (time == found ? 0.5 : 0.0);
    }
    below.push_back(share / static_cast<double>(samples.per_round));
  }
  const auto [error, freedom] = samples.openings.size() > 1 ? error_over_sessions(below, samples.openings) : standard_error(below);
  const double reach = student_quantile(freedom) * error;
  return {quantile(sorted, std::max(0.0, 0.5 - reach)), quantile(sorted, std::min(1.0, 0.5 + reach))};
}

}  // namespace

double quantile(const std::vector<double>& sorted, double share) {
  const double position = static_cast<double>(sorted.size() - 1) * share;
  const auto below = static_cast<size_t>(position);
  const auto above = std::min(below + 1, sorted.size() - 1);
  const double rest = position - static_cast<double>(below), step = sorted[above] - sorted[below];
  return rest < 0.5 ? sorted[below] + step * rest : sorted[above] - step * (1 - rest);
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return (values[(values.size() - 1) / 2] + values[values.size() / 2]) / 2;
}

size_t needed_runs(double share) { return static_cast<size_t>(std::ceil(std::log(1 - confidence) / std::log(share))); }

Summary summarize(const Samples& samples) {
  std::vector<double> sorted(samples.ns.begin(), samples.ns.end());
  const auto count = static_cast<double>(sorted.size());
  const double mean = std::accumulate(sorted.begin(), sorted.end(), 0.0) / count;
  double squares = 0;
  for (const double time : sorted) squares += (time - mean) * (time - mean);
  std::sort(sorted.begin(), sorted.end());
  const auto [low, high] = median_interval(samples, sorted);
  const auto percentile = [&](double share) -> std::optional<double> {
    if (sorted.size() < needed_runs(share)) return std::nullopt;
    return quantile(sorted, share) / 1e6;
  };
  return {sorted.size(),     quantile(sorted, 0.5) / 1e6, low / 1e6,         high / 1e6,
          percentile(0.90),  percentile(0.95),            percentile(0.99),  percentile(0.999),
          mean / 1e6,        std::sqrt(squares / count) / 1e6, sorted.front() / 1e6, sorted.back() / 1e6};
}

}  // namespace deploycc
